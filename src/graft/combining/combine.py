"""Make one lasting adapter of several trained ones, attach it, and say how far it is from their weighted sum.

LoRAs can be combined by their factors, A and B apart, as PEFT's `add_weighted_adapter` does, or laid side by side (`cat`), which is their
sum exactly. Any adapter that is a difference of weights of linear layers has its difference D; the differences are combined, and a LoRA of
a given rank approximates the result. Adapters that are no differences, such as bottlenecks, can be averaged if their settings are equal.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from graft.adapters.base import AdapterConfig
from graft.attaching.parameters import tensors
from graft.attaching.together import weights_of
from graft.combining.arithmetic import Arithmetic, combined
from graft.combining.loras import distance, is_lora, of_differences, of_factors
from graft.errors import GraftError
from graft.formats.composing import composed
from graft.formats.filling import attach_filled
from graft.formats.folder import SiteAdapter, site_adapters
from graft.injection.state import State, state_of, unwrapped

How = Literal["cat", "svd"] | Arithmetic
HOWS: tuple[str, ...] = tuple(each for part in get_args(How) for each in (get_args(part) or (part,)))
On = Literal["factors", "differences"]
PRUNING = ("magnitude-prune", "dare", "ties", "dare-ties")


@dataclass(frozen=True)
class Combined:
    """What a combination is."""

    how: str
    on: Literal["factors", "differences", "parameters"]
    """What was combined: LoRA's A and B, differences of weights, or the parameters of equal adapters."""
    weights: dict[str, float]
    modules: int
    rank: int | None
    """The highest rank of the LoRA; None for the average of another kind."""
    error: float | None
    """The distance from the weighted sum of the adapters' differences, relative to that sum (Frobenius norm). None for an average."""
    worst: float | None
    """The same at the module where it is largest."""
    input_changed_by: tuple[str, ...] = ()
    """The adapters that change a layer's input (OFT, (IA)3 at inputs): on one row with others they act before those, so that the sum of
    differences is not quite what they compute there."""


@torch.no_grad()
def combine(
    model: nn.Module,
    adapters: Sequence[str] | Mapping[str, float],
    name: str,
    *,
    how: str = "cat",
    on: On | None = None,
    rank: int | None = None,
    density: float | None = None,
    seed: int = 0,
) -> Combined:
    """Attach one adapter made of several attached ones, which stay.

    adapters: their names, each with weight 1, or a weight for each; an average of parameters has the same weight for each by default.
    how: cat (LoRAs side by side: the sum, exactly), svd (the sum, approximated by a LoRA), linear, ties, dare, dare-ties or
    magnitude-prune (`arithmetic.py`). on: combine the factors of LoRAs, the default where their ranks are equal, or the differences of
    weights. rank: of the LoRA that approximates differences; by default the highest rank of the adapters. density: the share of entries
    that pruning keeps, 0.5 by default. seed: of random pruning.
    Raises `GraftError` for a name that is taken or not there, an adapter that is named twice, weights, density or rank that are out of
    range, and adapters that cannot be combined like this.
    """
    root, state = unwrapped(model), state_of(model)
    if how not in HOWS:
        raise GraftError(f"there is no way '{how}' to combine adapters; there is {', '.join(HOWS)}")
    weights = weights_of(state, adapters)
    names = list(weights)
    if len(names) < 2:
        raise GraftError(f"a combination is made of at least two adapters; given: {names[0]}")
    if name in state.adapters:
        raise GraftError(f"an adapter '{name}' is attached already: choose another name for the combination")
    if density is not None and how not in PRUNING:
        raise GraftError(f"density is for {', '.join(PRUNING)}, which prune; {how} does not: leave it out")
    if density is not None and not 0.0 < density <= 1.0:
        raise GraftError(f"density is the share of entries that pruning keeps, above 0 and at most 1; given: {density}")
    if rank is not None and (not isinstance(rank, int) or rank < 1):
        raise GraftError(f"a rank is a whole number of at least 1; given: {rank}")
    kept = 0.5 if density is None else density
    parts = {each: site_adapters(root, state, each) for each in names}
    on = on or _usual(how, parts)
    if rank is not None and on != "differences":
        raise GraftError(
            f"rank is for the LoRA that approximates differences; {how} on {on or 'parameters'} keeps ranks: leave it out"
        )
    if on is None:
        equal = dict.fromkeys(names, 1.0 / len(names))
        return _averaged(model, root, state, weights if isinstance(adapters, Mapping) else equal, name, how)
    generator = torch.Generator().manual_seed(seed)
    if on == "factors":
        pieces = of_factors(parts, weights, how, kept, generator)
    else:
        pieces = of_differences(root, parts, weights, how, rank, kept, generator)
    config, found = composed(root, pieces)
    if wrong := next((key for key, tensor in found.items() if not bool(tensor.isfinite().all())), None):
        raise GraftError(f"the combination is not finite at {wrong}: the weights are too large")
    attach_filled(model, name, config, found, f"the combination of {' and '.join(names)}")
    error, worst = distance(root, pieces, parts, weights)
    ranks = [int(piece.config.rank) for piece in pieces]  # pyright: ignore[reportAttributeAccessIssue]
    before = tuple(name for name, own in parts.items() if any(each.module.acts_before for each in own))
    return Combined(how, on, weights, len(pieces), max(ranks), error, worst, before)


def _usual(how: str, parts: Mapping[str, list[SiteAdapter]]) -> On | None:
    """Return on what these adapters are combined if nothing is said; None: their parameters are averaged."""
    every = [each for own in parts.values() for each in own]
    if how == "cat":
        return "factors"
    if how == "svd":
        return "differences"
    if all(is_lora(each) for each in every) and len({each.config.rank for each in every}) == 1:
        return "factors"
    return "differences" if all(each.installed.changes_weight for each in every) or how != "linear" else None


def _averaged(
    model: nn.Module, root: nn.Module, state: State, weights: dict[str, float], name: str, how: str
) -> Combined:
    """Average the parameters of adapters with equal settings."""
    names = list(weights)
    first, *others = names
    settings = _settings(state.adapters[first].config)
    for each in others:
        own = _settings(state.adapters[each].config)
        if unlike := [key for key in settings | own if settings.get(key) != own.get(key)]:
            key = "kind" if "kind" in unlike else unlike[0]
            raise GraftError(
                f"'{first}' and '{each}' are not both differences of weights, so {how} averages their parameters, which takes equal "
                f"settings; {key} is {settings.get(key)!r} in one and {own.get(key)!r} in the other"
            )
    if abs(sum(weights.values()) - 1.0) > 1e-6:
        raise GraftError(
            f"the parameters of these adapters are averaged, so their weights have to add up to 1; they add up to {sum(weights.values()):g}"
        )
    stored: dict[str, Tensor] = {}
    every = {each: dict(tensors(root, state, each)) for each in names}
    for key, tensor in every[first].items():
        if tensor.is_floating_point():
            stored[key] = combined(
                "linear", [every[each][key] for each in names], list(weights.values()), 1.0, torch.Generator()
            )
        elif all(torch.equal(tensor, every[each][key]) for each in names):
            stored[key] = tensor.clone()
        else:
            raise GraftError(f"the adapters hold unlike whole numbers in {key}, which have no average")
    attach_filled(model, name, state.adapters[first].config, stored, f"the average of {' and '.join(names)}")
    return Combined(how, "parameters", weights, len(state.adapters[name].installs), None, None, None)


def _settings(config: AdapterConfig) -> dict[str, Any]:
    """Return what a config says of the adapter's computation: dropout and initial values do not matter any more."""
    found = config.model_dump()
    return {key: value for key, value in found.items() if key != "dropout" and not key.startswith("init")}

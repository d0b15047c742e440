"""Let several adapters serve one row: give a choice of adapters a name, and put it into the tables of every module that they act at.

Rows carry one name each, so a combination has a name too, such as "style+0.5*task", and each module has it in its tables beside the names
of single adapters. It owns no parameters: its entries refer to the modules of its adapters. It stays until one of them is detached, so
that choosing it again costs nothing.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from graft.adapters.base import Adapter
from graft.adapters.hooks import AttentionAdapter, EmbeddingAdapter
from graft.architectures.walk import CONTAINER, base_modules
from graft.attention.install import shift_positions
from graft.attention.virtual import CachedPrompt
from graft.errors import GraftError
from graft.injection.container import AdapterContainer
from graft.injection.hooks import Hooks, HostedAdapter
from graft.injection.state import Combination, Installed, State, state_of, unwrapped
from graft.injection.together import Part, Together, WeightedAttention, WeightedExperts, local_runs

Choice = str | Sequence[str] | Mapping[str, float] | None
"""What serves a row: an adapter, several in the order in which they act, several with a weight each, or the bare base (None)."""


def name_of(model: nn.Module, choice: Choice) -> str | None:
    """Return the name under which rows choose this, and put a combination that is new into the model.

    Raises `GraftError` for an unknown adapter, none or twice the same one, a weight that is not a finite number, and adapters that cannot
    serve one row or take a weight.
    """
    if choice is None or isinstance(choice, str):
        return choice
    root, state = unwrapped(model), state_of(model)
    weights = weights_of(state, choice)
    name = "+".join(each if weight == 1.0 else f"{weight!r}*{each}" for each, weight in weights.items())
    if name not in state.adapters and name not in state.combinations:
        if state.merged is not None:
            raise GraftError(f"adapter '{state.merged}' is merged into the base: call graft.unmerge first")
        _refuse(state, weights)
        state.combinations[name] = Combination(weights, state.free_slot())
        try:
            _put_in(root, state, name, weights)
        except BaseException:
            remove(root, state, name)
            raise
    return name


def weights_of(state: State, choice: Any) -> dict[str, float]:
    """Return the weight of each adapter that is named, 1 in a list of names.

    Raises `GraftError` for anything but names of attached adapters, each once, with finite weights.
    """
    if not isinstance(choice, Mapping | Sequence):
        raise GraftError(
            f"adapters are one name, a list of names, a mapping from names to weights, or None; given: {choice!r}"
        )
    names = [choice] if isinstance(choice, str) else list(choice)
    if not names:
        raise GraftError("the list of adapters is empty: name one, or write None for the bare base")
    for each in names:
        if not isinstance(each, str):
            raise GraftError(f"a list of adapters holds names; given: {each!r}")
        state.adapter(each)
    if len(set(names)) < len(names):
        twice = next(each for each in names if names.count(each) > 1)
        raise GraftError(
            f"adapter '{twice}' is named twice: name it once, with weight 2 if it should act twice as strongly"
        )
    given = choice if isinstance(choice, Mapping) else dict.fromkeys(names, 1.0)
    for each, weight in given.items():
        if isinstance(weight, bool) or not isinstance(weight, int | float) or not abs(weight) <= sys.float_info.max:
            raise GraftError(f"the weight of adapter '{each}' must be a finite number; given: {weight!r}")
    return {each: float(weight) for each, weight in given.items()}


def _refuse(state: State, weights: Mapping[str, float]) -> None:
    """Raise `GraftError` for adapters that cannot serve one row together."""
    owner: dict[str, str] = {}  # host -> the first adapter there
    for name, weight in weights.items():
        for each in state.adapters[name].installs:
            tokens = isinstance(each.module, EmbeddingAdapter) or (
                isinstance(each.module, AttentionAdapter) and not each.module.adds_attention
            )
            if tokens and weight != 1.0:
                raise GraftError(
                    f"adapter '{name}' has virtual tokens, which are there or not: its weight must be 1; given: {weight!r}"
                )
            first = owner.setdefault(each.site.module, name)
            if first != name and (each.config.replaces or each.module.runs_host) and not _differs(each):
                raise GraftError(
                    f"adapter '{name}' computes {each.site.module} anew, without what '{first}' did there: name '{name}' first, "
                    "or one of them"
                )


def _differs(installed: Installed) -> bool:
    """Whether a module is a difference of weights of a linear layer, which adds to those of other adapters."""
    return installed.changes_weight and not installed.module.acts_before


def _put_in(root: nn.Module, state: State, name: str, weights: Mapping[str, float]) -> None:
    differences = {id(each.module) for member in weights for each in state.adapters[member].installs if _differs(each)}
    moved: dict[int, HostedAdapter] = {}  # an adapter of a sublayer is in the tables of two modules, which share it
    for _, host in list(base_modules(root)):
        container = host._modules.get(CONTAINER)
        if not isinstance(container, AdapterContainer):
            continue
        hooks = container.hooks
        for member, weight in weights.items():
            for hosted in hooks.send.get(member, ()):
                hooks.add("send", name, _remote(moved, name, hosted, weight))
        _put_around(hooks, name, _parts(hooks.before, weights, differences), moved, "before")
        _put_around(hooks, name, _parts(hooks.adapt, weights, differences), moved, "adapt")
        for member, weight in weights.items():
            for each in hooks.second_attention.get(member, ()):
                hooks.add("second_attention", name, each if weight == 1.0 else WeightedAttention(each, weight))
            for each in hooks.experts.get(member, ()):
                hooks.add("experts", name, each if weight == 1.0 else WeightedExperts(each, weight))
            for each in hooks.prompts.get(member, ()):
                hooks.add("prompts", name, each)
        _put_virtual_tokens(root, state, host, hooks, name, weights)


def _parts(
    table: Mapping[str, Sequence[HostedAdapter]], weights: Mapping[str, float], differences: set[int]
) -> list[Part]:
    return [
        Part(hosted, weight, id(hosted.adapter) in differences)
        for member, weight in weights.items()
        for hosted in table.get(member, ())
    ]


def _put_around(hooks: Hooks, name: str, parts: list[Part], moved: dict[int, HostedAdapter], table: str) -> None:
    """Put what acts on the module's input or output into its table: an adapter from elsewhere alone, neighbours of its own together."""
    for run in local_runs(parts):
        hosted = run[0].hosted
        if hosted.remote:
            hooks.add(table, name, _remote(moved, name, hosted, run[0].weight))
        else:
            hooks.add(table, name, HostedAdapter(name, Together(run)))


def _remote(moved: dict[int, HostedAdapter], name: str, hosted: HostedAdapter, weight: float) -> HostedAdapter:
    if id(hosted) not in moved:
        local = HostedAdapter(hosted.name, hosted.adapter, None)
        adapter: Adapter = hosted.adapter if weight == 1.0 else Together([Part(local, weight, False)])
        moved[id(hosted)] = HostedAdapter(name, adapter, hosted.features, remote=True)
    return moved[id(hosted)]


def _put_virtual_tokens(
    root: nn.Module, state: State, host: nn.Module, hooks: Hooks, name: str, weights: Mapping[str, float]
) -> None:
    """Lay the virtual tokens of all adapters end to end. Prompts run through the model together, so their tokens here are one entry."""
    found = [each for member in weights for each in hooks.keys_values.get(member, ())]
    for each in found:
        if not each.cached_kv:
            hooks.add("keys_values", name, each)
    if cached := [each for each in found if each.cached_kv]:
        tokens = sum(each.position_shift for each in cached)
        prompt = CachedPrompt(state, tokens, any(each.windowed for each in cached))
        hooks.add("keys_values", name, prompt)
    if any(each.position_shift for each in found):
        assert state.site_table is not None
        shift_positions(root, state.site_table, state, name, host)


def remove(root: nn.Module, state: State, name: str) -> None:
    """Take a combination out of the model. Rows that it serves get the bare base."""
    state.combinations.pop(name)
    state.prompt_caches.pop(name, None)
    state.reroute(name, None)
    for _, module in base_modules(root):
        container = module._modules.get(CONTAINER)
        if isinstance(container, AdapterContainer):
            container.hooks.pop(name)
        module.__dict__.get("graft_shifts", {}).pop(name, None)


def without_adapter(model: nn.Module, adapter: str) -> None:
    """Take an adapter out of all combinations. Rows that it served together with others keep the others."""
    root, state = unwrapped(model), state_of(model)
    in_use = state.names_in_use
    for name in with_adapter(state, adapter):
        others = {each: weight for each, weight in state.combinations[name].weights.items() if each != adapter}
        rest = name_of(model, others) if name in in_use and others else None
        state.reroute(name, rest)
        remove(root, state, name)


def with_adapter(state: State, adapter: str) -> list[str]:
    """Return the names of the combinations that an adapter is in."""
    return [name for name, each in state.combinations.items() if adapter in each.weights]

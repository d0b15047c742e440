"""Bring a plain model into few bits so that as much as possible of a merged adapter survives.

Weights are rounded to the nearest level, which is best for a model that was in floating point, and at random so that the mean stays
(`ops/rounding.py`), which is best where the base came from few bits. Both roundings are then trained for a few steps (`recovering.py`),
since the one that is better before need not be so afterwards. The one whose answers on calibration rows diverge least from the merged
model's is kept; on a base that is in the same bits already, random rounding has the preference.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import nn

from graft.architectures.layers import is_transposed
from graft.bases.losses import Answers, compared, mean_loss
from graft.bases.quantising import replace_layer
from graft.bases.recovering import Rounded, RoundedWeight, holding, train_rounding
from graft.config.base import FewBits
from graft.data.batches import Batch
from graft.ops.grid import grid_of

NEAREST, STOCHASTIC = "nearest", "stochastic"
RATES = {NEAREST: 1e-3, STOCHASTIC: 3e-4}
"""The learning rate of each rounding. To the nearest, few weights are close to where they change: those half-way between two levels."""
STEPS = 192
"""Steps in which a rounding is trained, a batch of calibration rows each."""
LEANING = 2.0
"""How much more the divergence of rounding to the nearest counts where the base's weights lie on the levels: its errors then point to the
base and add up in the loss, and those of random rounding point nowhere."""
JUDGES = 32
"""Batches of calibration rows, the first ones, that choose among the roundings."""


@dataclass(frozen=True)
class Target:
    """The few bits that a model is brought into."""

    kind: FewBits
    double_quant: bool = True
    steps: int = STEPS
    """Steps in which each rounding is trained. They take several times the memory of the model in float32; 0 only rounds."""


@dataclass(frozen=True)
class Rounding:
    """The rounding that was kept, and what the held-out rows say of it."""

    method: str
    """nearest or stochastic, and for how many steps it was trained."""
    layers: int
    nearest: Answers
    """The answers with each weight rounded to the nearest, beside those of the merged model."""
    kept: Answers
    """With the rounding that was kept, in the dtype in which it is written; the divergence is from before that."""


def requantise(
    model: Any,
    target: Target,
    paths: Sequence[str],
    calibration: Sequence[Batch],
    held_out: Sequence[Batch],
    dtype: torch.dtype,
    on_levels: bool = False,
) -> Rounding:
    """Replace the plain linear layers of a float32 model at these paths by layers of bitsandbytes; everything else gets `dtype`.

    held_out: rows that choose nothing. on_levels: whether the base's weights, before the merge, lay on the levels of the target.
    """
    model.requires_grad_(False)

    def answers(batches: Sequence[Batch], **ways: Rounded) -> dict[str, Answers]:
        return compared(model, batches, {name: partial(holding, model, layers) for name, layers in ways.items()})[1]

    at_random = {path: _rounded(model, target, path, number) for number, path in enumerate(paths)}
    ways = {NEAREST: {path: each.to_the_nearest() for path, each in at_random.items()}, STOCHASTIC: at_random}
    judges = calibration[:JUDGES]
    found = answers(judges, **ways)
    counts = {NEAREST: LEANING if on_levels else 1.0, STOCHASTIC: 1.0}
    scores = {name: found[name].divergence * count for name, count in counts.items()}
    method = min(scores, key=scores.__getitem__)
    layers, least = ways[method], scores[method]
    for name, start in ways.items() if target.steps else ():
        trained = {path: each.copy() for path, each in start.items()}
        train_rounding(model, trained, calibration, target.steps, RATES[name])
        score = answers(judges, trained=trained)["trained"].divergence * counts[name]
        if score < least:
            method, layers, least = f"{name}, trained for {target.steps} steps", trained, score
    measured = answers(held_out, nearest=ways[NEAREST], kept=layers)
    model.to(dtype)
    for path, each in layers.items():
        bias = model.get_submodule(path).bias
        layer: Any = each.grid.layer(each.codes(), bias, torch.float32)
        layer.bias = None if bias is None else nn.Parameter(bias.detach().to(dtype), requires_grad=False)
        setattr(layer, "computes_in" if target.kind == "int8" else "compute_dtype", dtype)
        replace_layer(model, path, layer)
    kept = replace(measured["kept"], loss=mean_loss(model, held_out))
    return Rounding(method, len(layers), measured["nearest"], kept)


def _rounded(model: nn.Module, target: Target, path: str, seed: int) -> RoundedWeight:
    """Return the weight of a linear layer, rounded at random."""
    layer: Any = model.get_submodule(path)
    weight = (layer.weight.t() if is_transposed(layer) else layer.weight).detach().float().contiguous()
    random = torch.Generator(weight.device).manual_seed(seed)
    return RoundedWeight(weight, grid_of(weight, target.kind, target.double_quant), random)

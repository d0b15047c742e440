"""Bring a plain model into few bits so that as much as possible of a merged adapter survives.

Weights are rounded to the nearest level, which is best for a model that was in floating point, and at random so that the mean stays
(`ops/rounding.py`), which is best where the base came from few bits. The one whose answers on calibration rows diverge less from the
merged model's is kept, and its rounding is then trained for a few steps (`recovering.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from graft.architectures.layers import is_transposed
from graft.bases.quantising import replace_layer
from graft.bases.recovering import Rounded, RoundedWeight, holding, mean_divergence, train_rounding
from graft.config.base import FewBits
from graft.data.batches import Batch
from graft.ops.grid import grid_of

NEAREST, STOCHASTIC = "nearest", "stochastic"
STEPS = 96
"""Steps in which the rounding is trained, a batch of calibration rows each."""


@dataclass(frozen=True)
class Target:
    """The few bits that a model is brought into."""

    kind: FewBits
    double_quant: bool = True
    steps: int = STEPS
    """Steps in which the rounding is trained. They take several times the memory of the model in float32; 0 only rounds."""


@dataclass(frozen=True)
class Rounding:
    """The rounding that was kept, and what it cost."""

    method: str
    """nearest or stochastic, and for how many steps it was trained."""
    layers: int
    divergences: dict[str, float]
    """Divergence from the merged model on the calibration rows, by rounding."""
    losses: dict[str, float]
    """Loss on the held-out rows, by rounding."""
    held_out: dict[str, float]
    """Divergence from the merged model on the held-out rows, by rounding."""


def requantise(
    model: Any,
    target: Target,
    paths: Sequence[str],
    calibration: Sequence[Batch],
    held_out: Sequence[Batch],
    loss: Callable[[], float],
    dtype: torch.dtype,
) -> Rounding:
    """Replace the plain linear layers of a float32 model at these paths by layers of bitsandbytes; everything else gets `dtype`.

    held_out: rows that choose nothing. loss: the model's loss on them.
    """
    model.requires_grad_(False)
    ways = {name: _rounded(model, target, paths, name) for name in (NEAREST, STOCHASTIC)}
    found = {name: mean_divergence(model, layers, calibration) for name, layers in ways.items()}
    losses, divergences = {}, {}

    def measure(name: str, layers: Rounded) -> None:
        divergences[name] = mean_divergence(model, layers, held_out)
        with holding(model, layers):
            losses[name] = loss()

    for name, layers in ways.items():
        measure(name, layers)
    kept = min(found, key=lambda name: found[name])
    layers = ways.pop(kept)
    ways.clear()  # the other rounding is as large as the model
    if target.steps:
        first = {path: each.share.clone() for path, each in layers.items()}
        train_rounding(model, layers, calibration, target.steps)
        name = f"{kept}, trained for {target.steps} steps"
        found[name] = mean_divergence(model, layers, calibration)
        measure(name, layers)
        if found[name] < found[kept]:
            kept = name
        else:
            for path, share in first.items():
                layers[path].share = share
    model.to(dtype)
    for path, each in layers.items():
        bias = model.get_submodule(path).bias
        layer: Any = each.grid.layer(each.codes(), bias, torch.float32)
        layer.bias = None if bias is None else nn.Parameter(bias.detach().to(dtype), requires_grad=False)
        setattr(layer, "computes_in" if target.kind == "int8" else "compute_dtype", dtype)
        replace_layer(model, path, layer)
    losses[kept] = loss()  # of what is written, in its dtype
    return Rounding(kept, len(layers), found, losses, divergences)


def _rounded(model: nn.Module, target: Target, paths: Sequence[str], way: str) -> dict[str, RoundedWeight]:
    made: dict[str, RoundedWeight] = {}
    for number, path in enumerate(paths):
        layer = model.get_submodule(path)
        assert isinstance(layer.weight, torch.Tensor)
        weight = (layer.weight.t() if is_transposed(layer) else layer.weight).detach().float().contiguous()
        generator = torch.Generator(weight.device).manual_seed(number) if way == STOCHASTIC else None
        made[path] = RoundedWeight(weight, grid_of(weight, target.kind, target.double_quant), generator)
    return made

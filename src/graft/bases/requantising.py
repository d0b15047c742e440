"""Bring a plain model into few bits so that as much as possible of a merged adapter survives.

Several roundings are tried (`ops/rounding.py`): to the nearest, which is best for a model that was in floating point, and stochastic ones
from several seeds, which are best where the base came from few bits. The one with the lowest loss on calibration rows is kept, and then
changed block by block for another one wherever that lowers the loss.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from graft.architectures.layers import is_transposed
from graft.architectures.sites import SiteTable
from graft.bases.quantising import replace_layer
from graft.config.base import FewBits
from graft.ops.grid import grid_of
from graft.ops.rounding import nearest_codes, stochastic_codes

SEEDS = (0, 1, 2, 3)
"""Seeds of the stochastic roundings that are tried."""


@dataclass(frozen=True)
class Target:
    """The few bits that a model is brought into."""

    kind: FewBits
    double_quant: bool = True


@dataclass(frozen=True)
class Rounding:
    """The rounding that was kept, and what it cost."""

    method: str
    """nearest, or stochastic with its seed, and whether blocks took other ones."""
    layers: int
    calibration: dict[str, float]
    """Loss on the calibration rows by rounding."""
    held_out: dict[str, float]
    """Loss on the held-out rows by rounding."""


@torch.no_grad()
def requantise(
    model: Any,
    target: Target,
    paths: Sequence[str],
    loss: Callable[[], float],
    held_out: Callable[[], float],
    dtype: torch.dtype,
) -> Rounding:
    """Replace the plain linear layers of a float32 model at these paths by layers of bitsandbytes; everything else gets `dtype`.

    loss: the model's loss on the calibration rows. held_out: its loss on rows that choose nothing.
    """
    choices = {_name(seed): _rounded(model, target, paths, seed) for seed in (None, *SEEDS)}
    found: dict[str, float] = {}
    others: dict[str, float] = {}
    for name, layers in choices.items():
        with _replaced(model, layers):
            found[name], others[name] = loss(), held_out()
    first = min(found, key=lambda name: found[name])
    chosen, lowest, mixed = choices[first], found[first], False
    for block in _blocks(model, paths):
        for layers in choices.values():
            trial = {**chosen, **{path: layers[path] for path in block}}
            with _replaced(model, trial):
                own = loss()
            if own < lowest:
                chosen, lowest, mixed = trial, own, True
    name = f"{first}, then block by block" if mixed else first
    with _replaced(model, chosen):
        found[name], others[name] = lowest, held_out()
    model.to(dtype)
    for path, layer in chosen.items():
        replace_layer(model, path, layer)
        layer.bias = None if layer.bias is None else nn.Parameter(layer.bias.detach().to(dtype), requires_grad=False)
        setattr(layer, "computes_in" if target.kind == "int8" else "compute_dtype", dtype)
    return Rounding(name, len(chosen), found, others)


def _blocks(model: nn.Module, paths: Sequence[str]) -> Iterator[list[str]]:
    """Yield the layers of each block, and last the others."""
    left = list(paths)
    for block in SiteTable(model).blocks:
        own = [path for path in left if path.startswith(f"{block.path}.")]
        left = [path for path in left if path not in own]
        if own:
            yield own
    if left:
        yield left


def _name(seed: int | None) -> str:
    return "nearest" if seed is None else f"stochastic (seed {seed})"


def _rounded(model: nn.Module, target: Target, paths: Sequence[str], seed: int | None) -> dict[str, Any]:
    """Make the quantised layers, by the paths of the plain ones. seed: of stochastic rounding; None rounds to the nearest."""
    made: dict[str, nn.Module] = {}
    for number, path in enumerate(paths):
        layer = model.get_submodule(path)
        assert isinstance(layer.weight, torch.Tensor)
        weight = (layer.weight.t() if is_transposed(layer) else layer.weight).detach().float().contiguous()
        grid = grid_of(weight, target.kind, target.double_quant)
        if seed is None:
            codes = nearest_codes(weight, grid.scales, grid.levels)
        else:
            generator = torch.Generator(weight.device).manual_seed(seed * len(paths) + number)
            codes = stochastic_codes(weight, grid.scales, grid.levels, generator)
        made[path] = grid.layer(codes, layer.bias, torch.float32)  # pyright: ignore[reportArgumentType]
    return made


@contextmanager
def _replaced(model: nn.Module, layers: Mapping[str, nn.Module]) -> Iterator[None]:
    """Put other layers into a model for a block of code."""
    before = {path: model.get_submodule(path) for path in layers}
    try:
        for path, layer in layers.items():
            replace_layer(model, path, layer)
        yield
    finally:
        for path, layer in before.items():
            replace_layer(model, path, layer)

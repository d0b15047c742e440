"""Merge an adapter into few bits: what is measured before and after, and the share of the adapter's gain that survives."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from graft.architectures.layers import is_linear
from graft.attaching.active import use
from graft.bases.losses import compared
from graft.bases.quantised import method_of_layer
from graft.bases.quantising import instructions, kept_layers
from graft.bases.requantising import Rounding, Target, requantise
from graft.data.batches import Batch


@dataclass(frozen=True)
class IntoBits:
    """The few bits to merge into, and the rows that say what is lost. All batches are padded and on the model's device."""

    target: Target
    calibration: Sequence[Batch]
    held_out: Sequence[Batch]
    held_out_rows: str
    """What the held-out rows are, for people."""


@dataclass(frozen=True)
class Losses:
    """Losses on the held-out rows."""

    base: float
    """The base as it was, without the adapter."""
    adapter: float
    """The adapter beside it."""
    nearest: float
    """Merged, each weight rounded to the nearest."""
    merged: float
    """Merged, as it was written."""


@dataclass(frozen=True)
class Divergences:
    """How far answers on the held-out rows diverge from those of the adapter beside its base: nats per target (squared for values).

    Chance moves these less than it moves losses, whose difference may have either sign.
    """

    base: float
    """The base, without the adapter."""
    nearest: float
    merged: float


@dataclass(frozen=True)
class BitsReport:
    """What merging into few bits kept."""

    kind: str
    rounding: str
    """The rounding that was kept."""
    layers: int
    losses: Losses
    divergences: Divergences
    rows: str
    """What the losses were measured on."""

    def kept(self, loss: float) -> float | None:
        """Return the share of the adapter's gain that a loss keeps; None if the adapter gains nothing on these rows."""
        gain = self.losses.base - self.losses.adapter
        return None if gain <= 0 else (self.losses.base - loss) / gain


@dataclass(frozen=True)
class Before:
    """What is known before the merge."""

    base: float
    adapter: float
    divergence: float
    """Of the base's answers from the adapter's."""
    paths: tuple[str, ...]
    """Linear layers that are to be quantised: those that are, or those that loading would quantise."""
    on_levels: bool
    """Whether they are in the target's bits already."""


def before_merging(model: Any, name: str, into: IntoBits, labelled: bool) -> Before:
    """Measure the base and the adapter, and choose the layers. labelled: whether the model is a classifier."""
    loss, found = compared(model, into.held_out, {"base": lambda: use(model, None)}, wanted=lambda: use(model, name))
    layers = {
        path: module for path, module in model.named_modules() if is_linear(module) and "graft" not in path.split(".")
    }
    held = {path: method for path, module in layers.items() if (method := method_of_layer(module)) is not None}
    paths, on_levels = [*held], bool(held) and all(method.startswith(into.target.kind) for method in held.values())
    if not held:
        kept = kept_layers(None, model, labelled)
        paths = [path for path in layers if path not in kept]
    return Before(found["base"].loss, loss, found["base"].divergence, tuple(paths), on_levels)


def bring_into_bits(model: Any, into: IntoBits, before: Before, dtype: torch.dtype) -> BitsReport:
    """Quantise the merged float32 model in place, and say in its config that it is quantised."""
    target = into.target
    rounding: Rounding = requantise(
        model, target, before.paths, into.calibration, into.held_out, dtype, before.on_levels
    )
    kept = [path for path, module in model.named_modules() if is_linear(module) and path not in before.paths]
    model.config.quantization_config = instructions(target.kind, target.double_quant, dtype, kept)
    found = Losses(before.base, before.adapter, rounding.nearest.loss, rounding.kept.loss)
    far = Divergences(before.divergence, rounding.nearest.divergence, rounding.kept.divergence)
    return BitsReport(target.kind, rounding.method, rounding.layers, found, far, into.held_out_rows)

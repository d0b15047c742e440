"""Train the rounding of a merged model: which of its two levels each weight takes.

A weight lies at a share of the way between two levels, and takes the upper one where the share is above its threshold: one half rounds to
the nearest, a random number rounds so that the mean stays. Training moves the shares and keeps the thresholds. The gradient is that of the
divergence of the rounded model's answers from the merged one's, taken at the rounded weights and handed to the shares as if the step were
not there (the straight-through estimator, arXiv 1308.3432). A small rate is the point: only weights close to their threshold change.

Legend: O output features, I input features.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from graft.architectures.layers import is_transposed
from graft.bases.losses import divergence, divergence_between, logits_at_targets
from graft.data.batches import Batch
from graft.ops.grid import Grid
from graft.ops.rounding import between

RATE = 3e-4
"""Adam's learning rate at the first step; it falls to 0. A share moves by about this much in a step."""


class RoundedWeight:
    """A weight [O, I], each entry on one of the two levels around it."""

    def __init__(self, weight: Tensor, grid: Grid, generator: torch.Generator | None) -> None:
        """generator: on the weight's device, for thresholds at random; None rounds to the nearest."""
        below, self.share = between(weight, grid.scales, grid.levels)
        self.grid, self.below = grid, below.to(torch.uint8)
        self.threshold = (
            torch.full_like(self.share, 0.5)
            if generator is None
            else torch.rand(weight.shape, generator=generator, device=weight.device)
        )

    def codes(self) -> Tensor:
        """Return the numbers of the levels, [O, I]."""
        return self.below.long() + (self.share > self.threshold)

    def dense(self) -> Tensor:
        """Return the weight that the levels stand for, [O, I]."""
        return self.grid.dense(self.codes())

    def take_gradient(self, gradient: Tensor) -> None:
        """Hand the gradient of the weight [O, I] to the shares, by the step between each entry's levels."""
        below = self.below.long()
        self.share.grad = gradient * (self.grid.levels[below + 1] - self.grid.levels[below]) * self.grid.scales


Rounded = Mapping[str, RoundedWeight]
"""Path of a linear layer -> its weight."""


def train_rounding(model: Any, rounded: Rounded, batches: Sequence[Batch], steps: int) -> None:
    """Move the shares so that the answers come close to those of the model, whose own weights are the merged ones in float32."""
    optimizer = torch.optim.Adam([each.share for each in rounded.values()], lr=RATE)
    for step in range(steps):
        batch = batches[step % len(batches)]
        with torch.no_grad():
            wanted = logits_at_targets(model, batch)
        with torch.enable_grad(), holding(model, rounded) as weights:
            far = divergence(logits_at_targets(model, batch), wanted, batch.target_ids.is_floating_point())
            gradients = torch.autograd.grad(far / batch.num_targets, list(weights.values()))
        for (path, each), gradient in zip(rounded.items(), gradients, strict=True):
            each.take_gradient(gradient.t() if is_transposed(model.get_submodule(path)) else gradient)
        optimizer.param_groups[0]["lr"] = RATE * (1 - step / steps)
        optimizer.step()
        for each in rounded.values():
            each.share.clamp_(0, 1).grad = None


def mean_divergence(model: Any, rounded: Rounded, batches: Sequence[Batch]) -> float:
    """Return the mean divergence per target of the rounded model from the model itself."""
    return divergence_between(model, batches, given=lambda: holding(model, rounded))


@contextmanager
def holding(model: nn.Module, rounded: Rounded) -> Iterator[dict[str, nn.Parameter]]:
    """Give the layers the rounded weights for a block of code. Yields these as parameters, by path."""
    layers = {path: model.get_submodule(path) for path in rounded}
    before = {path: layer.weight for path, layer in layers.items()}
    weights: dict[str, nn.Parameter] = {}
    try:
        for path, layer in layers.items():
            dense = rounded[path].dense()
            layer.weight = weights[path] = nn.Parameter(dense.t() if is_transposed(layer) else dense)
        yield weights
    finally:
        for path, layer in layers.items():
            layer.weight = before[path]

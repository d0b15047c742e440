"""Train the rounding of a merged model: which of its two levels each weight takes.

A weight lies at a share of the way between two levels, and takes the upper one where the share is above its threshold: one half rounds to
the nearest, a random number rounds so that the mean stays. Training moves the shares and keeps the thresholds. The gradient is that of the
divergence of the rounded model's answers from the merged one's, taken at the rounded weights and handed to the shares as if the step were
not there (the straight-through estimator, arXiv 1308.3432). A small rate is the point: only weights close to their threshold change.

Legend: O output features, I input features.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from graft.architectures.layers import is_transposed
from graft.bases.losses import divergence, logits_at_targets
from graft.data.batches import Batch
from graft.ops.grid import Grid
from graft.ops.rounding import between


class RoundedWeight:
    """A weight [O, I], each entry on one of the two levels around it."""

    def __init__(self, weight: Tensor, grid: Grid, generator: torch.Generator) -> None:
        """generator: of the thresholds, on the weight's device."""
        below, self.share = between(weight, grid.scales, grid.levels)
        self.grid, self.below = grid, below.to(torch.uint8)
        self.threshold = torch.rand(weight.shape, generator=generator, device=weight.device)

    def to_the_nearest(self) -> RoundedWeight:
        """Return the same weight with thresholds of one half. Both share their tensors."""
        other = copy.copy(self)
        other.threshold = torch.tensor(0.5, device=self.share.device)
        return other

    def copy(self) -> RoundedWeight:
        """Return the same weight with shares of its own."""
        other = copy.copy(self)
        other.share = self.share.clone()
        return other

    def codes(self) -> Tensor:
        """Return the numbers of the levels, [O, I]."""
        return (self.below + (self.share > self.threshold)).long()

    def dense(self) -> Tensor:
        """Return the weight that the levels stand for, [O, I]."""
        return self.grid.dense(self.codes())

    def take_gradient(self, gradient: Tensor) -> None:
        """Hand the gradient of the weight [O, I] to the shares, by the step between each entry's levels."""
        below = self.below.long()
        self.share.grad = gradient * (self.grid.levels[below + 1] - self.grid.levels[below]) * self.grid.scales


Rounded = Mapping[str, RoundedWeight]
"""Path of a linear layer -> its weight."""


def train_rounding(model: Any, rounded: Rounded, batches: Sequence[Batch], steps: int, rate: float) -> None:
    """Move the shares so that the answers come close to those of the model, whose own weights are the merged ones in float32.

    rate: Adam's learning rate at the first step; it falls to 0. A share moves by about this much in a step.
    """
    optimizer = torch.optim.Adam([each.share for each in rounded.values()], lr=rate)
    for step in range(steps):
        batch = batches[step % len(batches)]
        with torch.no_grad():
            wanted = logits_at_targets(model, batch)
        with torch.enable_grad(), holding(model, rounded) as weights:
            for path, weight in weights.items():
                turned = is_transposed(model.get_submodule(path))
                weight.register_post_accumulate_grad_hook(partial(_hand_on, rounded[path], turned))
            far = divergence(logits_at_targets(model, batch), wanted, batch.target_ids.is_floating_point())
            (far / batch.num_targets).backward()
        optimizer.param_groups[0]["lr"] = rate * (1 - step / steps)
        optimizer.step()
        for each in rounded.values():
            each.share.clamp_(0, 1).grad = None


def _hand_on(rounded: RoundedWeight, turned: bool, weight: Tensor) -> None:
    """Hand the gradient of a layer's weight on as soon as backward has it, and free it. turned: whether the layer holds [I, O]."""
    assert weight.grad is not None
    rounded.take_gradient(weight.grad.t() if turned else weight.grad)
    weight.grad = None


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

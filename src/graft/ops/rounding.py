"""Round the numbers of a weight to levels: to the nearest, or at random so that the mean stays.

What an adapter adds to a weight is small beside the steps between levels, and the weights of a quantised base lie on levels already.
Rounding to the nearest then gives the base's own levels back, and nearly all of the adapter is lost. Rounded at random, a number between
two levels takes the upper one with the probability that keeps its mean, so what was added is still there in the sum over a layer's inputs.

Example: the levels are 0 and 1, and an adapter moves 100 weights from 0 to 0.1. The nearest level is 0 for all of them; at random about
ten become 1.

Legend: O output features, I input features, K levels.
"""

from __future__ import annotations

import torch
from torch import Tensor


def nearest_codes(weight: Tensor, scales: Tensor, levels: Tensor) -> Tensor:
    """Return the number of the nearest level of each entry. weight: [O, I]; scales: [O, I] or [O, 1]; levels: [K], rising -> [O, I]."""
    return torch.bucketize(_scaled(weight, scales), (levels[1:] + levels[:-1]) / 2)


def stochastic_codes(weight: Tensor, scales: Tensor, levels: Tensor, generator: torch.Generator) -> Tensor:
    """Return for each entry the level above or below it, at random, so that the mean is the entry. Arguments are those of `nearest_codes`.

    Entries beyond the outermost levels take these. generator: on the device of the weight.
    """
    scaled = _scaled(weight, scales)
    upper = torch.bucketize(scaled, levels).clamp(1, len(levels) - 1)
    below, above = levels[upper - 1], levels[upper]
    # Two levels may be equal (the zeros of fp4); then either is right.
    share = ((scaled - below) / (above - below).clamp(min=torch.finfo(levels.dtype).tiny)).clamp(0, 1)
    drawn = torch.rand(share.shape, generator=generator, device=share.device, dtype=share.dtype)
    return torch.where(drawn < share, upper, upper - 1)


def _scaled(weight: Tensor, scales: Tensor) -> Tensor:
    return weight / scales.clamp(min=torch.finfo(scales.dtype).tiny)

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


def between(weight: Tensor, scales: Tensor, levels: Tensor) -> tuple[Tensor, Tensor]:
    """Return the number of the level below each entry, and the entry's share of the way from there to the level above: both [O, I].

    Entries beyond the outermost levels take these: the share is 0 or 1. weight: [O, I]; scales: [O, I] or [O, 1]; levels: [K], rising.
    """
    scaled = weight / scales.clamp(min=torch.finfo(scales.dtype).tiny)
    below = torch.bucketize(scaled, levels).clamp(1, len(levels) - 1) - 1
    step = levels[below + 1] - levels[below]
    # Two levels may be equal (the zeros of fp4); then either is right.
    return below, ((scaled - levels[below]) / step.clamp(min=torch.finfo(levels.dtype).tiny)).clamp(0, 1)

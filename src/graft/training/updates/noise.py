"""Normal noise that a key makes again: the same numbers in any order, in pieces of any size, and on every device.

Philox (Salmon et al. 2011) under the key (seed, index) counts through the numbers of one tensor. They are drawn in float32 on the CPU;
a tensor of another format is rounded once, after the addition.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

PIECE = 1 << 22
"""Most numbers that are drawn at a time."""
_DOMAIN = 0x4E4F4953
"""Keeps these keys apart from those of dropout, which come from the same seed and step."""


def step_key(seed: int, step: int, direction: int = 0) -> int:
    """Return the key (64 bits) of the noise of one step. direction: number of the noise, where a step has several."""
    return int(np.random.SeedSequence((_DOMAIN, seed, step, direction)).generate_state(1, np.uint64)[0])


@torch.no_grad()
def add_noise_(tensor: Tensor, scale: float, key: int, index: int) -> None:
    """Add scale * z to a tensor in place, z standard normal noise of this key for the tensor with this number."""
    random = np.random.Generator(np.random.Philox(key=np.array([key, index], np.uint64)))
    pieces = tensor.view(-1).split(PIECE) if tensor.is_contiguous() else (tensor,)
    for piece in pieces:
        drawn = torch.from_numpy(random.standard_normal(piece.numel(), dtype=np.float32)).view(piece.shape)
        piece.add_(drawn.to(piece.device), alpha=scale)

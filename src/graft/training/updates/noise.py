"""Normal noise that a key makes again: the same numbers in any order, in pieces of any size, and on every device.

A word of 64 bits is a hash of its place in the tensor under the key (seed, index), by the steps of splitmix64 (Steele et al. 2014), in
whole numbers alone, so every device computes the same. Each quarter of a word names one of 65,536 equally likely numbers: the quantiles
of a normal distribution at the middle of each part, scaled to variance 1. The largest is 4.3.

Numbers are drawn in float32 on the tensor's device; a tensor of another format is rounded once, after the addition.
"""

from __future__ import annotations

import functools

import numpy as np
import torch
from torch import Tensor

from graft.routing.seeded import mix

PIECE = 1 << 16
"""Most numbers that are drawn at a time, a multiple of 4: what a cache of a processor holds."""
_DOMAIN = 0x4E4F4953
"""Keeps these keys apart from those of dropout, which come from the same seed and step."""
_QUANTILES = 1 << 16
_STEP, _FIRST, _SECOND = -0x61C8864680B583EB, -0x40A7B892E31B1A47, -0x6B2FB644ECCEEE15
"""The constants of splitmix64, as signed integers."""


def step_key(seed: int, step: int, direction: int = 0) -> int:
    """Return the key (64 bits) of the noise of one step. direction: number of the noise, where a step has several."""
    return int(np.random.SeedSequence((_DOMAIN, seed, step, direction)).generate_state(1, np.uint64)[0])


@torch.no_grad()
def add_noise_(tensor: Tensor, scale: float, key: int, index: int) -> None:
    """Add scale * z to a tensor in place, z standard normal noise of this key for the tensor with this number."""
    quantiles, at = _quantiles(tensor.device), 0
    start = mix(key, index)
    other = mix(start, _DOMAIN)
    for piece in tensor.view(-1).split(_piece(tensor)) if tensor.is_contiguous() else (tensor,):
        words = torch.arange(at, at + -(-piece.numel() // 4), device=piece.device)
        at += len(words)
        words.mul_(_STEP).add_(start)
        words.bitwise_xor_(_shifted(words, 30)).mul_(_FIRST).bitwise_xor_(other)
        words.bitwise_xor_(_shifted(words, 27)).mul_(_SECOND)
        words.bitwise_xor_(_shifted(words, 31))
        numbers = words.view(torch.int16)[: piece.numel()].int().add_(_QUANTILES // 2)
        piece.add_(quantiles.index_select(0, numbers).view(piece.shape), alpha=scale)


def _shifted(words: Tensor, bits: int) -> Tensor:
    """Shift to the right, with zeros on the left."""
    return (words >> bits).bitwise_and_((1 << 64 - bits) - 1)


def _piece(tensor: Tensor) -> int:
    """A GPU takes more at a time, since each operation has to be started there."""
    return PIECE if tensor.device.type == "cpu" else 64 * PIECE


@functools.cache
def _quantiles(device: torch.device) -> Tensor:
    """The numbers of the noise, in ascending order [65536]. They are made on the CPU, so that all devices have the same."""
    middles = (torch.arange(_QUANTILES, dtype=torch.float64) + 0.5) / _QUANTILES
    values = torch.special.ndtri(middles)
    return (values / values.square().mean().sqrt()).float().to(device)

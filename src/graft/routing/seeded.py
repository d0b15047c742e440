"""Random numbers that follow from a seed and a site: hashes of integers, and the bits of a dropout mask."""

from __future__ import annotations

import torch
from torch import Tensor


def kept(like: Tensor, p: float, generator: torch.Generator) -> Tensor:
    """Draw True with probability 1 - p, rounded to a multiple of 1/65536: 16 random bits per element, fewer than `bernoulli_` draws."""
    # One random int64 is viewed as four int16, so 10 elements need 3 words. An int16 n is kept if n >= round(p 65536) - 32768: for p = 0.25
    # that is n >= -16384, which 3 of 4 numbers are. The bound stays within int16, so at p = 1 one number of 65536 is still kept.
    words = torch.empty(-(-like.numel() // 4), dtype=torch.int64, device=like.device)
    bits = words.random_(-(2**63), None, generator=generator).view(torch.int16)[: like.numel()]
    return (bits >= min(round(p * 2**16) - 2**15, 2**15 - 1)).view(like.shape)


def mix(seed: int, site: int) -> int:
    """Hash two integers into a 63-bit seed, with the constants of splitmix64."""
    z = (seed * 0x9E3779B97F4A7C15 + site * 0xBF58476D1CE4E5B9 + 1) & 0xFFFFFFFFFFFFFFFF
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & 0xFFFFFFFFFFFFFFFF
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & 0xFFFFFFFFFFFFFFFF
    return (z ^ (z >> 31)) & 0x7FFFFFFFFFFFFFFF


def stream(seed: int, site: int, device: torch.device) -> torch.Generator:
    """Return the generator of a seed at a site."""
    return torch.Generator(device).manual_seed(mix(seed, site))


def other_stream(seed: int, site: int, device: torch.device) -> torch.Generator:
    """Return a second one, whose numbers are not those of `stream`."""
    return torch.Generator(device).manual_seed(~mix(seed, site) & 2**63 - 1)


def whole_number(seed: int, site: int, choices: int) -> int:
    """Return a number from 0 to `choices` - 1. Its stream is not that of the dropout mask of the same seed and site."""
    return mix(mix(seed, site), choices) % choices

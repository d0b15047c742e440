"""ALiBi: each head adds slope * position of the key to its scores. Press et al. 2021 (arXiv 2108.12409).

Legend: B rows, H heads, L queries, S keys, D head size.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Alibi:
    """The slopes [H] in the dtype in which the model multiplies them by positions, and a factor of the product."""

    slopes: Tensor
    scale: float = 1.0

    def bias(self, positions: Tensor, dtype: torch.dtype) -> Tensor:
        """positions [..., S] -> [..., H, 1, S], rounded as the model rounds."""
        return (self.slopes[:, None] * positions[..., None, :]).to(dtype).unsqueeze(-2) * self.scale


def slopes_of(num_heads: int, device: torch.device) -> Tensor:
    """The slope of each head [H]: a series from 2^(-8/n), n the power of two below H, interleaved for the rest."""
    power = 2 ** (num_heads.bit_length() - 1)
    series = [2 ** (-8 * (i + 1) / power) for i in range(power)]
    rest = [2 ** (-4 * (2 * i + 1) / power) for i in range(num_heads - power)]
    return torch.tensor(series + rest, device=device)


def biased_mask(bias: Tensor, mask: Tensor | None, query: Tensor, key: Tensor) -> Tensor:
    """bias [B, H, 1, S] and mask [B, 1, L, S] as one additive mask; None is causal."""
    length, keys = query.shape[2], key.shape[2]
    if mask is None:
        mask = torch.ones(length, keys, dtype=torch.bool, device=key.device).tril(keys - length)[None, None]
    mask = mask[..., :keys]
    if mask.dtype == torch.bool:
        return torch.where(mask, bias, torch.finfo(bias.dtype).min).to(query.dtype)
    return (bias + mask).to(query.dtype)

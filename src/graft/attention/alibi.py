"""ALiBi: each head adds slope * (position of the key) to its scores. Press et al. 2021 (arXiv 2108.12409).

Legend: B rows, H heads, L queries, S keys, D head size.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from graft.architectures.transformers_internals import model_file_function


@dataclass(frozen=True)
class Alibi:
    """The slopes [H], in the dtype in which the model multiplies them by positions, and a factor for the product."""

    slopes: Tensor
    scale: float = 1.0

    def bias(self, positions: Tensor, dtype: torch.dtype) -> Tensor:
        """Return the bias [..., H, 1, S] of keys at these positions [..., S], rounded as the model rounds it."""
        return (self.slopes[:, None] * positions[..., None, :]).to(dtype).unsqueeze(-2) * self.scale


def slopes_of(module: Any, device: torch.device) -> Tensor:
    """Return the slopes [H] of an attention module: what its model file adds at position 1."""
    build = model_file_function(module, "build_alibi_tensor")
    return build(torch.ones(1, 2, device=device), module.num_heads, torch.float32)[:, 0, 1]


def biased_mask(bias: Tensor, mask: Tensor | None, query: Tensor, key: Tensor) -> Tensor:
    """Combine a bias [B, H, 1, S] and a mask [B, 1, L, S] into one additive mask. A mask of None is causal."""
    length, keys = query.shape[2], key.shape[2]
    if mask is None:
        mask = torch.ones(length, keys, dtype=torch.bool, device=key.device).tril(keys - length)[None, None]
    mask = mask[..., :keys]
    if mask.dtype == torch.bool:
        return torch.where(mask, bias, torch.finfo(bias.dtype).min).to(query.dtype)
    return (bias + mask).to(query.dtype)

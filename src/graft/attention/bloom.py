"""BLOOM's attention through the attention function, with ALiBi as an additive bias.

Used only while virtual tokens or a token-flat batch need it; the original forward serves everything else.
Press et al. 2021 (arXiv 2108.12409).

Legend: B rows, H heads, L queries, S keys, D head size.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from graft.attention.functions import attend, current_pass
from graft.attention.needed import needed
from graft.substitution import register_mixin


@register_mixin
class BloomForward:
    """Mixin for `BloomAttention`."""

    def forward(
        self: Any, hidden_states: Tensor, residual: Tensor, alibi: Tensor, attention_mask: Tensor | None, layer_past: Any = None,
        use_cache: bool = False, output_attentions: bool = False, **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:  # fmt: skip
        if not needed(self):
            return super().forward(  # pyright: ignore
                hidden_states, residual, alibi, attention_mask, layer_past=layer_past, use_cache=use_cache,
                output_attentions=output_attentions, **kwargs,
            )  # fmt: skip
        query_BHLD, key_BHSD, value_BHSD = self._reshape(self.query_key_value(hidden_states))
        if layer_past is not None:
            key_BHSD, value_BHSD = layer_past.update(key_BHSD, value_BHSD, self.layer_idx)
        bias = alibi.view(-1, self.num_heads, 1, alibi.shape[-1])[..., : key_BHSD.shape[2]]
        flat = current_pass(self).flat
        slopes = slopes_of(self.num_heads, alibi.device)
        output_BLHD, weights = attend(
            self, "eager" if output_attentions else "sdpa", query_BHLD, key_BHSD, value_BHSD,
            None if flat else biased_mask(bias, attention_mask, query_BHLD, key_BHSD), slopes=slopes,
            scaling=self.inv_norm_factor, dropout=self.attention_dropout.p if self.training else 0.0, is_causal=None if flat else False,
        )  # fmt: skip
        output = self.dense(output_BLHD.flatten(2))
        return residual + F.dropout(output, self.hidden_dropout, self.training), weights


def slopes_of(num_heads: int, device: torch.device) -> Tensor:
    """ALiBi's slope of each head [H]: a geometric series from 2^(-8/n), n the power of two below H, interleaved for the rest."""
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

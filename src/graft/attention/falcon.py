"""Falcon's attention through the attention function, with rotary positions or ALiBi.

Used only while virtual tokens or a token-flat batch need it; the original forward serves everything else. Almazrouei et al. 2023
(arXiv 2311.16867).

Legend: B rows, H heads, K key-value heads as the module holds them, L queries, S keys, D head size.
"""

from __future__ import annotations

import sys
from typing import Any

from torch import Tensor

from graft.attention.alibi import Alibi, biased_mask, slopes_of
from graft.attention.functions import attend, current_context, needed
from graft.injection.substitution import register_mixin


@register_mixin
class FalconForward:
    """Mixin for `FalconAttention`."""

    def forward(
        self: Any, hidden_states: Tensor, alibi: Tensor | None, attention_mask: Tensor | None, position_ids: Tensor | None = None,
        layer_past: Any = None, use_cache: bool = False, output_attentions: bool = False, position_embeddings: Any = None, **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:  # fmt: skip
        if not needed(self):
            return super().forward(  # pyright: ignore
                hidden_states, alibi, attention_mask, position_ids=position_ids, layer_past=layer_past, use_cache=use_cache,
                output_attentions=output_attentions, position_embeddings=position_embeddings, **kwargs,
            )  # fmt: skip
        query, key, value = (part.transpose(1, 2) for part in self._split_heads(self.query_key_value(hidden_states)))
        if alibi is None:
            rotate = sys.modules[type(self).__module__].apply_rotary_pos_emb
            query, key = rotate(query, key, *position_embeddings)
        if layer_past is not None:
            key, value = layer_past.update(key, value, self.layer_idx)
        mask, bias, dropout = attention_mask, None, 0.0
        if alibi is not None:
            twice = output_attentions or self.config._attn_implementation == "eager"
            # Falcon multiplies by bfloat16 slopes and scales the sum of scores and ALiBi.
            bias = Alibi(slopes_of(self.num_heads, alibi.device).bfloat16(), (2 if twice else 1) * self.inv_norm_factor)
            if not current_context(self).flat:
                mask = _mask(
                    alibi.view(-1, self.num_heads, 1, alibi.shape[-1]) * self.inv_norm_factor, mask, query, key, twice
                )
            dropout = self.attention_dropout.p if self.training else 0.0
        output_BLHD, weights = attend(
            self, "eager" if output_attentions else "sdpa", query, _repeated(key, query), _repeated(value, query), mask, alibi=bias,
            scaling=self.inv_norm_factor, dropout=dropout,
        )  # fmt: skip
        return self.dense(output_BLHD.flatten(2)), weights


def _mask(bias: Tensor, mask: Tensor | None, query: Tensor, key: Tensor, twice: bool) -> Tensor:
    """The model adds ALiBi to the mask, which is then [B, H, L, S]; its eager attention adds it once more, and so do we."""
    bias = bias[..., : key.shape[2]]
    if mask is None or mask.shape[1] == 1:
        return biased_mask(bias, mask, query, key)
    mask = mask[..., : key.shape[2]]
    return mask + bias if twice else mask


def _repeated(x_BKSD: Tensor, query: Tensor) -> Tensor:
    return x_BKSD if x_BKSD.shape[1] == query.shape[1] else x_BKSD.expand(-1, query.shape[1], -1, -1)

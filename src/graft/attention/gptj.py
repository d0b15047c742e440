"""GPT-J's attention through the attention function (Wang and Komatsuzaki 2021; rotary positions on the first `rotary_dim` features).

Used only while virtual tokens or a token-flat batch need it; the original forward serves everything else.

Legend: B rows, H heads, L queries, S keys, D head size, R rotated features.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from graft.attention.functions import attend, needed
from graft.injection.substitution import register_mixin


@register_mixin
class GPTJForward:
    """Mixin for `GPTJAttention`."""

    def forward(
        self: Any, hidden_states: Tensor, layer_past: Any = None, attention_mask: Tensor | None = None, position_ids: Tensor | None = None,
        use_cache: bool | None = False, output_attentions: bool | None = False, **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:  # fmt: skip
        if not needed(self):
            return super().forward(  # pyright: ignore
                hidden_states, layer_past=layer_past, attention_mask=attention_mask, position_ids=position_ids, use_cache=use_cache,
                output_attentions=output_attentions, **kwargs,
            )  # fmt: skip
        shape = (*hidden_states.shape[:-1], self.num_attention_heads, self.head_dim)
        query_BLHD, key_BLHD, value_BLHD = (
            layer(hidden_states).view(shape) for layer in (self.q_proj, self.k_proj, self.v_proj)
        )
        assert position_ids is not None
        table = self.embed_positions.to(position_ids.device)[position_ids].to(key_BLHD.dtype)
        query_BLHD, key_BLHD = (_rotated(x, table, self.pos_embd_dim) for x in (query_BLHD, key_BLHD))
        query, key, value = (x.transpose(1, 2) for x in (query_BLHD, key_BLHD, value_BLHD))
        if layer_past is not None:
            key, value = layer_past.update(key, value, self.layer_idx)

        def own() -> tuple[Tensor, Tensor]:
            output_BHLD, weights = self._attn(query, key, value, attention_mask)
            return output_BHLD.transpose(1, 2), weights

        output_BLHD, weights = attend(
            self, "eager" if output_attentions else "sdpa", query, key, value, attention_mask, own=own,
            scaling=float(self.head_dim) ** -0.5, dropout=self.attn_dropout.p if self.training else 0.0,
        )  # fmt: skip
        return self.resid_dropout(self.out_proj(output_BLHD.flatten(2))), weights


def _rotated(x_BLHD: Tensor, table_BLR: Tensor, rotary_dim: int) -> Tensor:
    """Rotate each neighbouring pair (2i, 2i + 1) of the first R features by the position's angle; the rest passes."""
    sin, cos = (half.repeat_interleave(2, -1).unsqueeze(2) for half in table_BLR.chunk(2, -1))
    x, rest = x_BLHD[..., :rotary_dim], x_BLHD[..., rotary_dim:]
    turned = torch.stack((-x[..., 1::2], x[..., ::2]), -1).flatten(-2)
    return torch.cat((x * cos + turned * sin, rest), -1)

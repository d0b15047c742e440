"""GPT-J's attention through the attention function, up to transformers 5.23 (Wang and Komatsuzaki 2021; rotary positions).

From 5.24 on GPT-J calls the attention interface itself, and this file is not used. Before, this forward runs only with virtual tokens or
a padding-free batch; otherwise the module's own forward runs.

Legend: B rows, H heads, L queries, S keys, D head size, R rotated features.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from graft.architectures.transformers_internals import model_file_function
from graft.attention.functions import attend, needed
from graft.attention.own_forward import OwnForward, with_past
from graft.injection.arguments import given_to
from graft.injection.substitution import register_mixin


@register_mixin
class GPTJForward(OwnForward):
    """Mixin for `GPTJAttention`."""

    def forward(self: Any, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        if not needed(self):
            return super().forward(*args, **kwargs)  # pyright: ignore
        return self.through_function(given_to(self, args, kwargs))

    def through_function(self: Any, given: Mapping[str, Any], exact: bool = True) -> tuple[Tensor, Tensor | None]:
        hidden_states, mask, position_ids = given["hidden_states"], given.get("attention_mask"), given["position_ids"]
        shape = (*hidden_states.shape[:-1], self.num_attention_heads, self.head_dim)
        query_BLHD, key_BLHD, value_BLHD = (
            layer(hidden_states).view(shape) for layer in (self.q_proj, self.k_proj, self.v_proj)
        )
        table = self.embed_positions.to(position_ids.device)[position_ids].to(key_BLHD.dtype)
        query_BLHD, key_BLHD = (self._rotated(x, table) for x in (query_BLHD, key_BLHD))
        query, key, value = (x.transpose(1, 2) for x in (query_BLHD, key_BLHD, value_BLHD))
        key, value = with_past(self, given, key, value)

        def own() -> tuple[Tensor, Tensor]:
            output_BHLD, weights = self._attn(query, key, value, mask)
            return output_BHLD.transpose(1, 2), weights

        output_BLHD, weights = attend(
            self, "eager" if given.get("output_attentions") else "sdpa", query, key, value, mask, own=own if exact else None,
            scaling=float(self.head_dim) ** -0.5, dropout=self.attn_dropout.p if self.training else 0.0,
        )  # fmt: skip
        return self.resid_dropout(self.out_proj(output_BLHD.flatten(2))), weights

    def _rotated(self: Any, x_BLHD: Tensor, table_BLR: Tensor) -> Tensor:
        """Rotate the first R features by the position's angle with the model file's function, and keep the rest."""
        rotate, (sin, cos) = model_file_function(self, "apply_rotary_pos_emb"), table_BLR.chunk(2, -1)
        size = self.pos_embd_dim
        return torch.cat([rotate(x_BLHD[..., :size], sin, cos), x_BLHD[..., size:]], -1)

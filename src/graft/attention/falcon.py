"""Falcon's attention through the attention function, with rotary positions or ALiBi.

It runs only with virtual tokens or a padding-free batch; otherwise the module's own forward runs. Almazrouei et al. 2023 (arXiv
2311.16867).

Legend: B rows, H heads, K key-value heads as the module holds them, L queries, S keys, D head size.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from graft.architectures.transformers_internals import model_file_function
from graft.attention.alibi import Alibi, biased_mask, slopes_of
from graft.attention.functions import attend, current_context, needed
from graft.attention.own_forward import OwnForward, with_past
from graft.injection.arguments import given_to
from graft.injection.substitution import register_mixin


@register_mixin
class FalconForward(OwnForward):
    """Mixin for `FalconAttention`."""

    def forward(self: Any, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        if not needed(self):
            return super().forward(*args, **kwargs)  # pyright: ignore
        return self.through_function(given_to(self, args, kwargs))

    def through_function(self: Any, given: Mapping[str, Any], exact: bool = True) -> tuple[Tensor, Tensor | None]:
        alibi, output_attentions, fused = (
            given["alibi"], given.get("output_attentions"), self.query_key_value(given["hidden_states"])
        )  # fmt: skip
        query, key, value = (part.transpose(1, 2) for part in self._split_heads(fused))
        if alibi is None:
            rotate = model_file_function(self, "apply_rotary_pos_emb")
            query, key = rotate(query, key, *given["position_embeddings"])
        key, value = with_past(self, given, key, value)
        mask, bias, dropout = given["attention_mask"], None, 0.0
        if alibi is not None:
            # Eager attention (and output_attentions) adds ALiBi to the scores although the mask holds it already.
            twice = output_attentions or self.config._attn_implementation == "eager"
            # Falcon multiplies by bfloat16 slopes and scales the sum of scores and ALiBi.
            bias = Alibi(slopes_of(self, alibi.device).bfloat16(), (2 if twice else 1) * self.inv_norm_factor)
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
    """Return the mask with ALiBi in it, [B, H, L, S]. A mask for each head has it already; twice: add it again, as eager attention does."""
    bias = bias[..., : key.shape[2]]
    if mask is None or mask.shape[1] == 1:
        return biased_mask(bias, mask, query, key)
    mask = mask[..., : key.shape[2]]
    return mask + bias if twice else mask


def _repeated(x_BKSD: Tensor, query: Tensor) -> Tensor:
    return x_BKSD if x_BKSD.shape[1] == query.shape[1] else x_BKSD.expand(-1, query.shape[1], -1, -1)

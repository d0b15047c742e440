"""BLOOM's attention through the attention function, with ALiBi as an additive bias.

It runs only with virtual tokens or a padding-free batch; otherwise the module's own forward runs.
Press et al. 2021 (arXiv 2108.12409).

Legend: B rows, H heads, L queries, S keys, D head size.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from graft.attention.alibi import Alibi, biased_mask, slopes_of
from graft.attention.functions import attend, current_context, needed
from graft.attention.own_forward import OwnForward, with_past
from graft.injection.arguments import given_to
from graft.injection.substitution import register_mixin


@register_mixin
class BloomForward(OwnForward):
    """Mixin for `BloomAttention`."""

    def forward(self: Any, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        if not needed(self):
            return super().forward(*args, **kwargs)  # pyright: ignore
        return self.through_function(given_to(self, args, kwargs))

    def through_function(self: Any, given: Mapping[str, Any], exact: bool = True) -> tuple[Tensor, Tensor | None]:
        alibi, attention_mask = given["alibi"], given["attention_mask"]
        query_BHLD, key_BHSD, value_BHSD = self._reshape(self.query_key_value(given["hidden_states"]))
        key_BHSD, value_BHSD = with_past(self, given, key_BHSD, value_BHSD)
        bias = alibi.view(-1, self.num_heads, 1, alibi.shape[-1])[..., : key_BHSD.shape[2]]
        flat = current_context(self).flat

        def own() -> tuple[Tensor, Tensor]:
            return _as_bloom_does(self, query_BHLD, key_BHSD, value_BHSD, alibi, attention_mask)

        output_BLHD, weights = attend(
            self, "eager" if given.get("output_attentions") else "sdpa", query_BHLD, key_BHSD, value_BHSD,
            None if flat else biased_mask(bias, attention_mask, query_BHLD, key_BHSD), alibi=Alibi(slopes_of(self, alibi.device)),
            own=own if exact else None, scaling=self.inv_norm_factor, dropout=self.attention_dropout.p if self.training else 0.0,
            is_causal=None if flat else False,
        )  # fmt: skip
        output = self.dense(output_BLHD.flatten(2))
        return given["residual"] + F.dropout(output, self.hidden_dropout, self.training), weights


def _as_bloom_does(
    self: Any, query_BHLD: Tensor, key_BHSD: Tensor, value_BHSD: Tensor, alibi: Tensor, mask: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Compute output [B, L, H, D] and weights in the model's own order of operations; every backend rounds differently."""
    query, key, value = (x.flatten(0, 1) for x in (query_BHLD, key_BHSD, value_BHSD))
    scores = alibi.baddbmm(query, key.transpose(-1, -2), beta=self.beta, alpha=self.inv_norm_factor)
    scores_BHLS = scores.view(*query_BHLD.shape[:3], -1)
    scores_BHLS = scores_BHLS if mask is None else scores_BHLS + mask
    weights_BHLS = self.attention_dropout(F.softmax(scores_BHLS, -1, dtype=torch.float32).to(query.dtype))
    output = torch.bmm(weights_BHLS.flatten(0, 1), value).view(query_BHLD.shape)
    return output.transpose(1, 2), weights_BHLS

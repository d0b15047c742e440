"""DeBERTa's disentangled attention with virtual tokens, whose scores have no term for positions. He et al. 2021 (arXiv 2006.03654).

It runs only with virtual tokens; otherwise the module's own forward runs.

Legend: B rows, H heads, L tokens, P virtual tokens, D head size.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from graft.attention.functions import current_context, needed
from graft.attention.own_forward import OwnForward
from graft.attention.virtual import virtual_tokens
from graft.errors import GraftError
from graft.injection.arguments import given_to
from graft.injection.substitution import register_mixin


@register_mixin
class DebertaForward(OwnForward):
    """Mixin for `DisentangledSelfAttention` of DeBERTa."""

    def forward(self: Any, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        if not needed(self):
            return super().forward(*args, **kwargs)  # pyright: ignore
        return self.through_function(given_to(self, args, kwargs))

    def through_function(self: Any, given: Mapping[str, Any], exact: bool = True) -> tuple[Tensor, Tensor | None]:
        relative_pos, rel_embeddings = given.get("relative_pos"), given.get("rel_embeddings")
        if given.get("query_states") is not None or self.talking_head:
            raise GraftError(
                "prefix adapters cannot run with DeBERTa's talking heads or with separate query states: choose another kind"
            )
        query, key, value = self.transpose_for_scores(self.in_proj(given["hidden_states"])).chunk(3, -1)
        factor = 1 + len(self.pos_att_type)
        query = (query + self.transpose_for_scores(self.q_bias[None, None])) / math.sqrt(query.shape[-1] * factor)
        value = value + self.transpose_for_scores(self.v_bias[None, None])
        scores_BHLL = query @ key.transpose(-1, -2)
        if self.relative_attention and rel_embeddings is not None and relative_pos is not None:
            bias = self.disentangled_att_bias(query, key, relative_pos, self.pos_dropout(rel_embeddings), factor)
            scores_BHLL = scores_BHLL + bias
        return _attended(self, query, scores_BHLL, value, given)


@register_mixin
class DebertaV2Forward(OwnForward):
    """Mixin for `DisentangledSelfAttention` of DeBERTa-v2."""

    def forward(self: Any, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        if not needed(self):
            return super().forward(*args, **kwargs)  # pyright: ignore
        return self.through_function(given_to(self, args, kwargs))

    def through_function(self: Any, given: Mapping[str, Any], exact: bool = True) -> tuple[Tensor, Tensor | None]:
        relative_pos, rel_embeddings = given.get("relative_pos"), given.get("rel_embeddings")
        heads, hidden_states = self.num_attention_heads, given["hidden_states"]
        query_input = hidden_states if given.get("query_states") is None else given["query_states"]
        query, key, value = (  # [B H, L, D]
            self.transpose_for_scores(layer(x), heads)
            for layer, x in (
                (self.query_proj, query_input),
                (self.key_proj, hidden_states),
                (self.value_proj, hidden_states),
            )
        )
        factor = 1 + ("c2p" in self.pos_att_type) + ("p2c" in self.pos_att_type)
        scale = math.sqrt(query.shape[-1] * factor)
        scores = query @ (key / scale).transpose(-1, -2)
        if self.relative_attention:
            embeddings = self.pos_dropout(rel_embeddings)
            scores = scores + self.disentangled_attention_bias(query, key, relative_pos, embeddings, factor)
        query_BHLD, scores_BHLL, value_BHLD = (x.view(-1, heads, *x.shape[-2:]) for x in (query / scale, scores, value))
        return _attended(self, query_BHLD, scores_BHLL, value_BHLD, given)


def _attended(
    self: Any, query: Tensor, scores: Tensor, value: Tensor, given: Mapping[str, Any]
) -> tuple[Tensor, Tensor | None]:
    """Attend to virtual and real tokens. query: [B, H, L, D], divided by the scale. scores: [B, H, L, L] with the terms for positions."""
    least = torch.finfo(query.dtype).min
    scores, count = scores.masked_fill(~given["attention_mask"].bool(), least), 0
    context = current_context(self)
    if context.flat:
        raise GraftError("DeBERTa is not causal: padding-free batches are for causal models")
    if self._modules["graft"].hooks.second_attention:
        raise GraftError(
            "llama-adapter cannot run in DeBERTa, because its scores depend on positions: choose kind prefix"
        )
    virtual = virtual_tokens(self, self.__dict__["graft_state"], context, query)
    if virtual is not None:
        rows = virtual.of_rows(query.shape[0], query.shape[1])
        own = (query @ rows.keys.to(query).transpose(-1, -2)).masked_fill(~rows.visible[:, None, None, :], -math.inf)
        scores, value, count = torch.cat([own, scores], -1), torch.cat([rows.values.to(value), value], 2), rows.count
    weights = self.dropout(torch.softmax(scores, -1))
    output = (weights @ value).transpose(1, 2).flatten(2)
    return output, weights[..., count:] if given.get("output_attentions") else None

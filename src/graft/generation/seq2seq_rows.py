"""The rows of a batch while the decoder of an encoder-decoder writes their answers: what `rows` is for causal models.

Questions are padded on the right and go through the encoder once; the decoder begins with its start token. Every row has written as many
tokens as the others, so nothing of the decoder is padded.

Legend: B rows, L padded length of the questions, V vocabulary, D hidden features.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache, EncoderDecoderCache
from transformers.modeling_outputs import BaseModelOutput

from graft.errors import GraftError
from graft.generation.batching import routed
from graft.generation.requests import Request
from graft.generation.rows import CacheKind, Rows
from graft.injection.arguments import cache_name
from graft.injection.state import unwrapped


class AnswerRows:
    """Rows whose answers are written together, a token at a time. No gradients."""

    def __init__(self, model: nn.Module, requests: Sequence[Request]) -> None:
        root: Any = unwrapped(model)
        self.model, self.root, self.device = model, root, root.device
        self.adapters = [request.adapter for request in requests]
        padding = root.config.get_text_config().pad_token_id or 0
        length = max(len(request.ids) for request in requests)
        rows = [request.ids + (padding,) * (length - len(request.ids)) for request in requests]
        counts_B = torch.tensor([len(request.ids) for request in requests])
        self.ids = torch.tensor(rows, device=self.device)
        self.mask = (torch.arange(length) < counts_B[:, None]).long().to(self.device)
        config = root.config.get_text_config()
        self.cache: Any = EncoderDecoderCache(DynamicCache(config=config), DynamicCache(config=config))
        self._cache_name = cache_name(root.forward) or "past_key_values"
        self.encoded_BLD: Tensor | None = None

    def forward(self, tokens_B: Tensor | None = None) -> Tensor:
        """[B, V] logits behind each row's next token; without tokens, behind the start token."""
        with torch.no_grad(), routed(self.model, self.adapters):
            if self.encoded_BLD is None:
                self.encoded_BLD = self.root.get_encoder()(input_ids=self.ids, attention_mask=self.mask)[0]
            if tokens_B is None:
                start = self.root.config.decoder_start_token_id
                tokens_B = torch.full((len(self.ids),), start, device=self.device)
            out = self.model(
                encoder_outputs=BaseModelOutput(last_hidden_state=self.encoded_BLD),  # pyright: ignore[reportArgumentType]
                attention_mask=self.mask, decoder_input_ids=tokens_B[:, None], use_cache=True, **{self._cache_name: self.cache},
            )  # fmt: skip
        return out.logits[:, -1]

    def select(self, index: Tensor) -> None:
        """Go on with these rows, in this order; one may be taken several times."""
        self.cache.reorder_cache(index)
        assert self.encoded_BLD is not None
        self.ids, self.mask, self.encoded_BLD = self.ids[index], self.mask[index], self.encoded_BLD[index]
        self.adapters = [self.adapters[row] for row in index.tolist()]


def rows_of(
    model: nn.Module, requests: Sequence[Request], room: int, cache: CacheKind = "dynamic"
) -> Rows | AnswerRows:
    """The rows of a batch, for the model's make. Raises `GraftError` for a cache that it cannot have."""
    if not getattr(getattr(unwrapped(model), "config", None), "is_encoder_decoder", False):
        return Rows(model, requests, room, cache)
    if cache != "dynamic":
        raise GraftError(
            f"encoder-decoders generate with a dynamic cache only, not with a {cache} one: use --cache dynamic"
        )
    return AnswerRows(model, requests)

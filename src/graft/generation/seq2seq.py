"""The batch that an encoder-decoder generates answers for (`causal` holds the one of causal models).

Questions are padded on the right and go through the encoder once. The decoder begins with its start token. All rows have the
same number of new tokens at any time, so the decoder needs no padding.

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
from graft.generation.causal import CacheKind, CausalBatch
from graft.generation.requests import Request
from graft.injection.arguments import cache_name
from graft.injection.state import unwrapped


class Seq2SeqBatch:
    """Rows that go through the decoder together, one token at a time, without gradients."""

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
        """Feed each row its newest token and return the logits [B, V] of the next one. None: feed the decoder's start token."""
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
        """Continue with these rows, in this order. A row may be repeated (as beam search does)."""
        self.cache.reorder_cache(index)
        assert self.encoded_BLD is not None
        self.ids, self.mask, self.encoded_BLD = self.ids[index], self.mask[index], self.encoded_BLD[index]
        self.adapters = [self.adapters[row] for row in index.tolist()]


def start_batch(
    model: nn.Module, requests: Sequence[Request], room: int, cache: CacheKind = "dynamic"
) -> CausalBatch | Seq2SeqBatch:
    """Return the batch class that fits the model, causal or encoder-decoder. room: most new tokens of any row.

    Raises `GraftError` for a cache that the model does not support.
    """
    if not getattr(getattr(unwrapped(model), "config", None), "is_encoder_decoder", False):
        return CausalBatch(model, requests, room, cache)
    if cache != "dynamic":
        raise GraftError(
            f"encoder-decoders generate with a dynamic cache only, but the cache is {cache}: use --cache dynamic"
        )
    return Seq2SeqBatch(model, requests)

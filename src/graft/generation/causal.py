"""The batch that a causal model generates answers for: attention mask, positions, adapters and KV cache of its rows.

There are three kinds of KV cache:

- `dynamic` grows with every token.
- `static` is allocated at its full length from the start.
- `compiled` is a static cache under `torch.compile`. There the number of rows must not change either, so the place of a
  finished row is filled with a copy of a running one.

Legend: B rows, L padded length of the prompts, V vocabulary.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Sequence
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from transformers import DynamicCache, StaticCache

from graft.architectures.positions import first_position
from graft.architectures.rope import company_of, forget_lengths
from graft.bases.context import positions_taken
from graft.errors import GraftError, did_you_mean
from graft.generation.batching import pad_left, routed
from graft.generation.joining import cut_layers, join_layers, pad_columns
from graft.generation.requests import Request
from graft.injection.arguments import cache_name
from graft.injection.state import unwrapped

CacheKind = Literal["dynamic", "static", "compiled"]
STEP = 128
"""The length of a static cache is rounded up to a multiple of this, so that few compiled graphs serve many batches."""


class CausalBatch:
    """Rows that go through the model together, one token at a time, without gradients."""

    def __init__(self, model: nn.Module, requests: Sequence[Request], room: int, cache: CacheKind = "dynamic") -> None:
        """room: most new tokens of any row. Raises `GraftError` for a cache that the model does not support."""
        root: Any = unwrapped(model)
        self.model, self.device = model, root.device
        self.adapters = [request.adapter for request in requests]
        self.prompts, self.mask = pad_left(requests, self.device)
        self.read_B = self.mask.sum(1)
        """Tokens that each row has read so far, without padding; this is the position of its next token."""
        self.compiled = cache == "compiled"
        self._step = torch.compile(model) if self.compiled else model
        self.live = len(requests)
        """Number of running rows. They come first; the rows after them are copies that keep the batch's size."""
        self._takes = inspect.signature(root.forward).parameters
        self._cache_name = cache_name(root.forward) or "past_key_values"
        self._last_only = {"logits_to_keep": 1} if "logits_to_keep" in self._takes else {}
        config = root.config.get_text_config()
        if cache == "dynamic":
            self._new_cache: Callable[[], Any] = lambda: DynamicCache(config=config)
        else:
            check_cache(model, cache)
            length = -(-(self.prompts.shape[1] + room) // STEP) * STEP  # rounded up
            self._new_cache = lambda: StaticCache(config=config, max_cache_len=length)
            self.mask = torch.nn.functional.pad(self.mask, (0, length - self.mask.shape[1]))
        self.cache = self._new_cache()
        self._seen = 0
        self._first_position = first_position(root)
        self._company = company_of(root)
        self._taken = max((positions_taken(root, name) for name in set(self.adapters) if name), default=0)
        self._text = self.prompts
        """All tokens so far, where the model may have to read them again."""
        forget_lengths(root)

    def forward(self, tokens_B: Tensor | None = None, every: bool = False) -> Tensor:
        """Feed each row its newest token and return the logits [B, V] of the next one. None: feed the prompts.

        every: return the logits at every column that is fed, [B, L, V].
        """
        first = tokens_B is None
        if tokens_B is None:
            # Positions count from the first real token: the mask [0, 0, 1, 1, 1] gives the positions [0, 0, 0, 1, 2].
            ids_BL, positions_BL = self.prompts, (self.mask[:, : self.prompts.shape[1]].cumsum(1) - 1).clamp(min=0)
        else:
            # Copies of a running row fill the places of finished ones (compiled cache only; elsewhere there are none).
            copies = tokens_B[:1].expand(len(self.read_B) - self.live)
            ids_BL, positions_BL = torch.cat([tokens_B, copies])[:, None], self.read_B[:, None]
            self.read_B = self.read_B + 1
            self._extend_mask()
            if self._company:
                self._text = torch.cat([self._text, ids_BL], 1)
                first = self._company.restarts(int(self.read_B.max()) + self._taken)
            if first:  # LongRoPE takes other factors from here on, so the keys of all tokens so far are made anew
                self.cache, self._seen, ids_BL = self._new_cache(), 0, self._text
                positions_BL = (self.mask[:, : ids_BL.shape[1]].cumsum(1) - 1).clamp(min=0)
        self._seen += ids_BL.shape[1]
        placed = {"position_ids": positions_BL + self._first_position} if "position_ids" in self._takes else {}
        run = self.model if first else self._step  # prompts have a new length in every batch: not worth compiling
        with torch.no_grad(), routed(self.model, self.adapters, self.mask[:, : ids_BL.shape[1]] if first else None):
            more: dict[str, Any] = {self._cache_name: self.cache, **placed, **({} if every else self._last_only)}
            out = run(input_ids=ids_BL, attention_mask=self.mask, use_cache=True, **more)
        return out.logits[: self.live] if every else out.logits[: self.live, -1]

    def select(self, index: Tensor) -> None:
        """Continue with these rows, in this order. A row may be repeated (as beam search does)."""
        self.live = len(index)
        # Once the compiled step has run, its graph expects the same number of rows: repeat the first row to keep it.
        if self.compiled and self._seen > self.prompts.shape[1]:
            index = torch.cat([index, index[:1].expand(len(self.read_B) - len(index))])
            self._reorder_in_place(index)
        else:
            self.cache.reorder_cache(index)
        self.mask, self.read_B = self.mask[index], self.read_B[index]
        self._text = self._text[index] if self._company else self._text
        self.adapters = [self.adapters[row] for row in index.tolist()]

    def join(self, others: Sequence[CausalBatch]) -> None:
        """Append the rows of other batches that have read their prompts too. All have dynamic caches; the others are used up."""
        every = [self, *others]
        width = max(each._seen for each in every)
        join_layers([each.cache for each in every], width)
        self.mask = torch.cat([pad_columns(each.mask, width) for each in every])
        self.read_B = torch.cat([each.read_B for each in every])
        self.adapters, self._seen = [name for each in every for name in each.adapters], width
        self.live = len(self.adapters)

    def part(self, rows: Sequence[int]) -> CausalBatch:
        """Return some rows, in this order, as a batch of their own. A row may be repeated. This batch stays as it is."""
        found = copy.copy(self)
        found.cache = copy.copy(self.cache)
        # Layers of a dynamic cache never write into their tensors, so both batches may share them.
        found.cache.layers = [copy.copy(layer) for layer in self.cache.layers]
        found.select(torch.tensor(rows, device=self.device))
        found.trim()
        return found

    def trim(self) -> None:
        """Drop the columns that are padding in every row. Needs a dynamic cache."""
        empty = int((self.mask.sum(0) == 0).long().cumprod(0).sum())
        if empty and not self._company:
            cut_layers(self.cache, empty)
            self.mask, self._seen = self.mask[:, empty:], self._seen - empty

    def _extend_mask(self) -> None:
        """Let the attention mask cover one token more. That of a static cache has its full length from the start."""
        if isinstance(self.cache, StaticCache):
            self.mask[:, self._seen] = 1
        else:
            self.mask = torch.nn.functional.pad(self.mask, (0, 1), value=1)

    def _reorder_in_place(self, index: Tensor) -> None:
        """Reorder the cache by copying into its tensors, because compiled graphs keep references to them."""
        for layer in self.cache.layers:
            keys, values = layer.keys, layer.values
            layer.reorder_cache(index)
            layer.keys, layer.values = keys.copy_(layer.keys), values.copy_(layer.values)


def check_cache(model: nn.Module, cache: str) -> None:
    """Raise `GraftError` for an unknown kind of cache and for one that the model does not support."""
    kinds = get_args(CacheKind)
    if cache not in kinds:
        raise GraftError(f"there is no cache '{cache}'.{did_you_mean(cache, kinds)} Known caches: {', '.join(kinds)}")
    root = unwrapped(model)
    if cache != "dynamic" and not getattr(root, "_can_compile_fullgraph", False):
        raise GraftError(
            f"{type(root).__name__} cannot generate with a {cache} cache, because transformers does not support a static cache "
            "for this model: use --cache dynamic"
        )

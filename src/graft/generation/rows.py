"""The rows of a batch while their answers are made: what each has read, its adapter, and the cache they share.

Three caches: `dynamic` grows with every token; `static` holds its full length from the start; `compiled` is a static one under
`torch.compile`, where the number of rows must not change either: rows that are done stay as copies of one that is not.

Legend: B rows, L padded length of the prompts, N length of the mask, V vocabulary.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from transformers import DynamicCache, StaticCache

from graft.errors import GraftError, did_you_mean
from graft.generation.batching import left_padded, routed
from graft.generation.requests import Request
from graft.injection.arguments import cache_name
from graft.injection.state import unwrapped

CacheKind = Literal["dynamic", "static", "compiled"]
STEP = 128
"""The length of a static cache is a multiple of this, so that few graphs serve many batches."""


class Rows:
    """Rows that go through the model together, a token at a time. No gradients."""

    def __init__(self, model: nn.Module, requests: Sequence[Request], room: int, cache: CacheKind = "dynamic") -> None:
        """room: most new tokens of any row. Raises `GraftError` for a cache that the model cannot have."""
        root: Any = unwrapped(model)
        self.model, self.device = model, root.device
        self.adapters = [request.adapter for request in requests]
        self.prompts, self.mask = left_padded(requests, self.device)
        self.read_B = self.mask.sum(1)
        """Tokens that each row has read, which is the position of its next."""
        self.compiled = cache == "compiled"
        self._step = torch.compile(model) if self.compiled else model
        self.live = len(requests)
        """How many of the rows are more than copies; they are the first."""
        self._takes = inspect.signature(root.forward).parameters
        self._cache_name = cache_name(root.forward) or "past_key_values"
        self._few = {"logits_to_keep": 1} if "logits_to_keep" in self._takes else {}
        config = root.config.get_text_config()
        if cache == "dynamic":
            self.cache: Any = DynamicCache(config=config)
        else:
            check_cache(model, cache)
            length = -(-(self.prompts.shape[1] + room) // STEP) * STEP
            self.cache = StaticCache(config=config, max_cache_len=length)
            self.mask = torch.nn.functional.pad(self.mask, (0, length - self.mask.shape[1]))
        self._seen = 0

    def forward(self, tokens_B: Tensor | None = None) -> Tensor:
        """[B, V] logits behind each row's next token; without tokens, behind the prompts."""
        first = tokens_B is None
        if first:
            ids_BL, positions_BL = self.prompts, (self.mask[:, : self.prompts.shape[1]].cumsum(1) - 1).clamp(min=0)
        else:
            copies = tokens_B[:1].expand(len(self.read_B) - self.live)
            ids_BL, positions_BL = torch.cat([tokens_B, copies])[:, None], self.read_B[:, None]
            self.read_B = self.read_B + 1
            self._see_one()
        self._seen += ids_BL.shape[1]
        placed = {"position_ids": positions_BL} if "position_ids" in self._takes else {}
        run = self.model if first else self._step
        with torch.no_grad(), routed(self.model, self.adapters, self.mask[:, : ids_BL.shape[1]] if first else None):
            more: dict[str, Any] = {self._cache_name: self.cache, **placed, **self._few}
            out = run(input_ids=ids_BL, attention_mask=self.mask, use_cache=True, **more)
        return out.logits[: self.live, -1]

    def select(self, index: Tensor) -> None:
        """Go on with these rows, in this order; one may be taken several times."""
        self.live = len(index)
        if self.compiled and self._seen > self.prompts.shape[1]:
            index = torch.cat([index, index[:1].expand(len(self.read_B) - len(index))])
            self._reorder_in_place(index)
        else:
            self.cache.reorder_cache(index)
        self.mask, self.read_B = self.mask[index], self.read_B[index]
        self.adapters = [self.adapters[row] for row in index.tolist()]

    def _see_one(self) -> None:
        """The mask covers the next token too."""
        if isinstance(self.cache, StaticCache):
            self.mask[:, self._seen] = 1
        else:
            self.mask = torch.nn.functional.pad(self.mask, (0, 1), value=1)

    def _reorder_in_place(self, index: Tensor) -> None:
        """Graphs hold on to the tensors of the cache."""
        for layer in self.cache.layers:
            keys, values = layer.keys, layer.values
            layer.reorder_cache(index)
            layer.keys, layer.values = keys.copy_(layer.keys), values.copy_(layer.values)


def check_cache(model: nn.Module, cache: str) -> None:
    """Raises `GraftError` for an unknown kind of cache, and for one that the model cannot have."""
    kinds = get_args(CacheKind)
    if cache not in kinds:
        raise GraftError(f"there is no cache '{cache}'.{did_you_mean(cache, kinds)} There are: {', '.join(kinds)}")
    root = unwrapped(model)
    if cache != "dynamic" and not getattr(root, "_can_compile_fullgraph", False):
        raise GraftError(
            f"{type(root).__name__} cannot generate with a {cache} cache: transformers has none for it. Use --cache dynamic"
        )

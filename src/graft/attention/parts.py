"""The attention of a batch in which prompts come before the rows that read them (`segments.py`): first theirs, then that of the rows.

Legend: K key-value heads, P virtual tokens, D head size.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from graft.routing.context import PromptCache


def attend_in_parts(
    attend: Callable[..., tuple[Tensor, Tensor | None]],
    module: Any,
    backend: str,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Any,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """Run the attention of a batch with prompts before its rows: theirs, then that of the rows, which get their keys and values."""
    state, container = module.__dict__["graft_state"], module._modules["graft"]
    head, rest = state.current.parts
    counts = head.lengths
    dim, sizes = (
        (2, [sum(counts), query.shape[2] - sum(counts)]) if head.flat else (0, [len(counts), len(query) - len(counts)])
    )
    parts = [each.split(sizes, dim) for each in (query, key, value)]
    keys, values = (each[0][0].split(counts, 1) if head.flat else each[0] for each in parts[1:])  # [K, P, D] each
    cache: PromptCache = {}
    for name, count, k, v in zip(head.rows, counts, keys, values, strict=True):
        for adapter in container.hooks.keys_values.get(name, ()):
            if adapter.cached_kv:
                cache[adapter] = k[:, :count].transpose(0, 1), v[:, :count].transpose(0, 1)
    if not torch.is_grad_enabled():
        head.cache_to_fill.update({adapter: (k.clone(), v.clone()) for adapter, (k, v) in cache.items()})
    masks = (
        mask.split(sizes) if not head.flat and isinstance(mask, Tensor) and len(mask) == sum(sizes) else (mask, mask)
    )
    given_x = container.attention_input
    found: list[tuple[Tensor, Tensor | None]] = []
    for number, context in enumerate((head, replace(rest, cached_kv=cache))):
        if given_x is not None:
            container.attention_input = given_x.split(sizes, 1 if head.flat else 0)[number]
        own = dict(kwargs)
        if not head.flat and (places := own.get("position_ids")) is not None and len(places) == sum(sizes):
            own["position_ids"] = places.split(sizes)[number]
        with state.carrying(context):
            found.append(attend(module, backend, *(each[number] for each in parts), masks[number], **own))
    container.attention_input = given_x
    (first, weights), (second, more) = found
    joined = None if weights is None or more is None else torch.cat([weights, more])
    return torch.cat([first, second], 1 if head.flat else 0), joined

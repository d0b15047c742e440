"""Join the KV caches of left-padded batches, and drop the columns that are padding in every row.

Keys carry their positions, so a row may stand anywhere in the columns: what counts is that its last token is in the last one.

    cache A   [a a a a]      joined   [a a a a]      after a has left and b is trimmed   [b b]
    cache B       [b b]               [- - b b]

A layer with a sliding window holds only the last columns, at most one less than its window, and counts all of them.

Legend: B rows, K key-value heads, L columns held, D features of a head.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from graft.architectures.rope import company_of


def joinable(root: Any) -> bool:
    """Whether rows can join a running batch of this model: every layer's cache is keys and values along the columns, no row changes what
    others compute, and there is no encoder."""
    if getattr(root.config, "is_encoder_decoder", False) or company_of(root):
        return False
    layers = DynamicCache(config=root.config.get_text_config()).layers
    return all(type(layer) in (DynamicLayer, DynamicSlidingWindowLayer) for layer in layers)


def join_layers(caches: Sequence[Any], width: int) -> None:
    """Append the rows of all caches to those of the first, which is as wide as `width` columns afterwards."""
    for layers in zip(*(each.layers for each in caches), strict=True):
        first: Any = layers[0]
        if not first.is_initialized:  # a layer that shares the keys of another one
            continue
        held = width
        if first.is_sliding:
            held, first.cumulative_length = min(width, first.sliding_window - 1), width
        first.keys = torch.cat([_wide(each.keys, held) for each in layers])
        first.values = torch.cat([_wide(each.values, held) for each in layers])


def cut_layers(cache: Any, columns: int) -> None:
    """Drop the first columns of a cache."""
    layer: Any
    for layer in cache.layers:
        if not layer.is_initialized:
            continue
        width = layer.get_seq_length() - columns
        if layer.is_sliding:
            layer.cumulative_length = width
        held = min(width, layer.keys.shape[2])
        layer.keys, layer.values = layer.keys[:, :, -held:], layer.values[:, :, -held:]


def pad_columns(mask_BL: Tensor, width: int) -> Tensor:
    """Pad a mask on the left with zeros."""
    return F.pad(mask_BL, (width - mask_BL.shape[1], 0))


def _wide(states_BKLD: Tensor, columns: int) -> Tensor:
    """Keys or values with this many columns: padded on the left with zeros, which the mask hides."""
    return F.pad(states_BKLD, (0, 0, columns - states_BKLD.shape[2], 0))

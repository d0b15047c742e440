"""Attention inside all segments of a padding-free batch in one kernel: torch's varlen attention (flash), on a GPU.

Elsewhere, and for what the kernel lacks (virtual tokens, ALiBi, soft caps, dropout, float32), each segment is a call of the backend's
function. The engine compares padding-free with padded losses on the first batch of every run, so if the kernel computed anything else the
run would go on padded.

Legend: T tokens of all segments, H query heads, K key-value heads, D head size.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from graft.injection.arguments import CACHE_NAMES

KNOWN = {"scaling", "sliding_window", "dropout", "is_causal", "output_attentions", "use_cache", *CACHE_NAMES}
"""Arguments of an attention call that the kernel supports, or that do not matter in a padding-free batch."""
LARGEST_HEAD = 256


@functools.cache
def kernel() -> Any:
    """Return `varlen_attn` if this torch has it with windows and grouped heads, else None."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None
    return (
        varlen_attn
        if {"window_size", "enable_gqa", "scale"} <= set(inspect.signature(varlen_attn).parameters)
        else None
    )


def serves(query: Tensor, kwargs: dict[str, Any]) -> bool:
    """Whether the kernel supports a call. query: [1, H, T, D]. kwargs: the call's other arguments."""
    unknown = any(value is not None and name not in KNOWN for name, value in kwargs.items())
    causal = kwargs.get("is_causal") is not False and not kwargs.get("dropout")
    return causal and not unknown and runs_on(query)


def runs_on(query: Tensor) -> bool:
    """Whether the kernel runs on tensors like this one: half precision, on an NVIDIA GPU from Ampere on, with a head size that it knows."""
    if not query.is_cuda or torch.version.hip is not None or query.dtype not in (torch.bfloat16, torch.float16):
        return False
    fits = query.shape[-1] % 8 == 0 and query.shape[-1] <= LARGEST_HEAD
    return fits and torch.cuda.get_device_capability(query.device) >= (8, 0) and kernel() is not None


def by_varlen(
    query: Tensor, key: Tensor, value: Tensor, lengths: Sequence[int], scaling: float | None, window: int | None
) -> Tensor:
    """Run causal attention inside each segment. query: [1, H, T, D]. key, value: [1, K, T, D]. Returns [1, T, H, D].

    lengths: tokens of each segment. window: how many of the latest tokens a token sees, including itself; None means all.
    """
    # Lengths 3 and 2 give the boundaries 0, 3, 5.
    ends = torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)
    ends = ends.to(query.device, non_blocking=True)
    query, key, value = (part[0].transpose(0, 1).contiguous() for part in (query, key, value))
    return kernel()(
        query, key, value, ends, ends, max(lengths), max(lengths), scale=scaling,
        window_size=(window - 1 if window else -1, 0), enable_gqa=query.shape[1] != key.shape[1],
    )[None]  # fmt: skip

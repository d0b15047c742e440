"""Beam search through transformers, for the rows of one batch.

A base may bring generation settings of its own (Llama's temperature, Qwen's repetition penalty), which transformers would mix
into ours; they are set aside for the call, so that a result depends on what its protocol says and on nothing else.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers import GenerationConfig

from graft.evaluation.batching import left_padded, routed
from graft.evaluation.requests import Decoding, Generated, Request
from graft.state import unwrapped


def beam_search(model: nn.Module, requests: Sequence[Request], limit: int, decoding: Decoding) -> list[Generated]:
    """The best beam of each request. All requests share one limit and one set of stop tokens."""
    root: Any = unwrapped(model)
    stop = sorted(requests[0].stop_ids)
    ids, mask = left_padded(requests, root.device)
    config = GenerationConfig(
        num_beams=decoding.beams, do_sample=False, max_new_tokens=limit, use_cache=True, pad_token_id=stop[0] if stop else 0,
        eos_token_id=stop or None,
    )  # fmt: skip
    with torch.no_grad(), _without_own_settings(root), routed(model, [request.adapter for request in requests]):
        out = root.generate(input_ids=ids, attention_mask=mask, generation_config=config)
    return [_answer(row, requests[0].stop_ids) for row in out[:, ids.shape[1] :].tolist()]


def _answer(row: list[int], stop_ids: frozenset[int]) -> Generated:
    """Cut at the first stop token, behind which there is padding."""
    end = next((index for index, token in enumerate(row) if token in stop_ids), None)
    return Generated(tuple(row), "truncated") if end is None else Generated(tuple(row[:end]), "stopped")


@contextmanager
def _without_own_settings(root: Any) -> Iterator[None]:
    own = root.generation_config
    root.generation_config = GenerationConfig()
    try:
        yield
    finally:
        root.generation_config = own

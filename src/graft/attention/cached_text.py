"""Start a prefix from a text: its first keys and values are those that the base computes for the text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from graft.adapters.hooks import AttentionAdapter
from graft.attention.proof import prove_forwards
from graft.errors import GraftError
from graft.injection.modes import evaluation_mode
from graft.injection.state import State
from graft.routing.context import ForwardContext, PromptCache


def start_from_text(
    root: Any, state: State, ids: tuple[int, ...], adapters: Sequence[tuple[nn.Module, AttentionAdapter]]
) -> None:
    """Run the bare base on token ids once, and start each adapter from the keys and values of its attention module.

    In a causal model a fresh adapter then acts like the text before the input. An encoder-decoder reads the text on both sides.
    adapters: (attention module, its adapter). Raises `GraftError` for ids that the base lacks, and for an attention module that does not
    call the attention function, so that nobody sees its keys and values.
    """
    size = root.get_input_embeddings().num_embeddings
    if unknown := [number for number in ids if not 0 <= number < size]:
        raise GraftError(f"init_ids: {unknown[0]} is not a token id of this base, which has {size}")
    prove_forwards(root, state)
    cache: PromptCache = {}
    device = root.get_input_embeddings().weight.device
    with evaluation_mode(root), torch.no_grad(), state.carrying(ForwardContext(cache_to_fill=cache)):
        tokens = torch.tensor([ids], device=device)
        more = {"decoder_input_ids": tokens} if getattr(root.config, "is_encoder_decoder", False) else {}
        root(input_ids=tokens, **more)
    for host, adapter in adapters:
        if host not in cache:
            raise GraftError(
                f"{type(host).__name__} does not show the keys and values that it computes for a text: use init: normal"
            )
        adapter.start_at(*cache[host])

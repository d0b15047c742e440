"""A prefix that starts as a cached prompt: the keys and values that the base computes of a text."""

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
    """Run the bare base on token ids once (an encoder-decoder reads them on both sides); each adapter begins at what its attention module
    computed. In a causal model, a fresh adapter is then the base with the text before its input.

    Raises `GraftError` for a base that has no such ids, or whose attention does not say what it computes.
    """
    size = root.get_input_embeddings().num_embeddings
    if unknown := [number for number in ids if not 0 <= number < size]:
        raise GraftError(f"init_ids: {unknown[0]} is no row of an embedding of {size}")
    prove_forwards(root, state)
    recording: PromptCache = {}
    device = root.get_input_embeddings().weight.device
    with evaluation_mode(root, state), torch.no_grad(), state.carrying(ForwardContext(recording=recording)):
        tokens = torch.tensor([ids], device=device)
        more = {"decoder_input_ids": tokens} if getattr(root.config, "is_encoder_decoder", False) else {}
        root(input_ids=tokens, **more)
    for host, adapter in adapters:
        if host not in recording:
            raise GraftError(
                f"{type(host).__name__} does not say which keys and values it computes of a text: use init: normal"
            )
        adapter.start_at(*recording[host])

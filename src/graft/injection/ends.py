"""The end of a stack of blocks, where the last hidden states are known: losses that wait for them are added there.

Legend: B rows, L length, R rows of one adapter, D features.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from graft.errors import GraftError
from graft.injection.state import State
from graft.injection.substitution import register_mixin
from graft.ops.added_loss import add_waiting
from graft.routing.context import ForwardContext


@register_mixin
class AddsAtEnd:
    """Mixin for the module that owns the blocks and returns the last hidden states first."""

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        state: State = self.__dict__["graft_state"]
        if state.current.rows is None or torch.compiler.is_compiling():
            return super().forward(*args, **kwargs)  # pyright: ignore
        with state.carrying(replace(state.current, adds_at_end=True, _groups={})):
            output = super().forward(*args, **kwargs)  # pyright: ignore
            h = output[0]
            added = _with_losses(h, state.current)
        if added is h:
            return output
        if isinstance(output, tuple):
            return (added, *output[1:])
        output[next(iter(output))] = added
        return output


def _with_losses(h: Tensor, context: ForwardContext) -> Tensor:
    """Return the last hidden states h, [B, L, D] or padding-free [1, T, D], with the losses that waited for them."""
    whole = [(context.rows, slice(None), context.everything)]
    dim = 1 if context.flat else 0
    for _, index, ctx in whole if isinstance(context.rows, str) else context.groups(h):
        if ctx.waiting:
            if context.parts is not None:
                raise GraftError(
                    "information compares the sequences of a pass, and virtual tokens before them (prompt, p-tuning) run as one more: "
                    "take a prefix instead"
                )
            own = h[(slice(None),) * dim + (index,)]
            h = add_waiting(h, ctx.mean(own), ctx)
    return h

"""A loss that an adapter adds to that of the job, from activations of a forward pass.

The adapter's output passes through unchanged, and backward gives the added loss a gradient of one. So it needs nobody to collect it: it
works in a plain loop, under a Trainer, with several jobs in a batch, and where blocks are recomputed. The loss that such a loop prints is
without it; Graft's engine logs it by its name and adds it to the loss of the step.

A loss that reads the last hidden states too waits for them (`at_the_end`); they then pass it on as an output does (`injection/ends.py`).

Legend: R rows, D features.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from graft.architectures.torch_internals import backward_pass_number
from graft.errors import GraftError
from graft.routing.context import AdapterContext


def with_loss(h: Tensor, values_R: Tensor, name: str, ctx: AdapterContext) -> Tensor:
    """Return h, and add the mean of a loss over all rows of the job's step: here, the values of these rows times their shares."""
    shares = (1 / len(values_R),) * len(values_R) if ctx.loss_shares is None else ctx.loss_shares
    loss = values_R @ values_R.new_tensor(shares)
    if ctx.losses is not None and backward_pass_number() == -1:  # a recomputed block would note it twice
        ctx.losses[name] = ctx.losses.get(name, 0.0) + loss.detach()
    return _Adds.apply(h, loss) if loss.requires_grad and torch.is_grad_enabled() else h


def at_the_end(loss: Callable[[Tensor], Tensor], name: str, ctx: AdapterContext) -> None:
    """Add a loss once the last hidden states are known. loss: from their means over the tokens of each row [R, D] to its values [R]."""
    if backward_pass_number() != -1:  # a recomputed block would add it twice
        return
    if ctx.waiting is None:
        raise GraftError(
            f"{name} is a loss on the last hidden states, which are not known here: run the whole model, and neither a part of it (a "
            "pipeline) nor a compiled one"
        )
    ctx.waiting.append((name, loss, torch.is_grad_enabled()))


def add_waiting(h: Tensor, ends_RD: Tensor, ctx: AdapterContext) -> Tensor:
    """Return h, and add the losses that waited for the last hidden states, of which these are the means."""
    assert ctx.waiting is not None
    for name, loss, learns in ctx.waiting:
        if torch.is_grad_enabled() and not learns:
            raise GraftError(
                f"{name} is a loss on activations, and here these are computed without gradients first (reentrant checkpointing, a "
                "reversible base): keep them, or checkpoint with use_reentrant=False"
            )
        h = with_loss(h, loss(ends_RD), name, ctx)
    ctx.waiting.clear()
    return h


class _Adds(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, h: Tensor, loss: Tensor) -> Tensor:
        ctx.like = loss.dtype, loss.device
        return h.view_as(h)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        dtype, device = ctx.like
        return grads[0], torch.ones((), dtype=dtype, device=device)

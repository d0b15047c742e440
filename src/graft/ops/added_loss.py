"""A loss that an adapter adds to that of the job, from activations of a forward pass.

The adapter's output passes through unchanged, and backward gives the added loss a gradient of one. So it needs nobody to collect it: it
works in a plain loop, under a Trainer, with several jobs in a batch, and where blocks are recomputed. The loss that such a loop prints is
without it; Graft's engine logs it by its name and adds it to the loss of the step.

Legend: R rows.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from graft.architectures.torch_internals import backward_pass_number
from graft.routing.context import AdapterContext


def with_loss(h: Tensor, values_R: Tensor, name: str, ctx: AdapterContext) -> Tensor:
    """Return h, and add the mean of a loss over all rows of the job's step: here, the values of these rows times their shares."""
    shares = (1 / len(values_R),) * len(values_R) if ctx.loss_shares is None else ctx.loss_shares
    loss = values_R @ values_R.new_tensor(shares)
    if ctx.losses is not None and backward_pass_number() == -1:  # a recomputed block would note it twice
        ctx.losses[name] = ctx.losses.get(name, 0.0) + loss.detach()
    return _Adds.apply(h, loss) if loss.requires_grad and torch.is_grad_enabled() else h


class _Adds(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, h: Tensor, loss: Tensor) -> Tensor:
        ctx.like = loss.dtype, loss.device
        return h.view_as(h)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        dtype, device = ctx.like
        return grads[0], torch.ones((), dtype=dtype, device=device)

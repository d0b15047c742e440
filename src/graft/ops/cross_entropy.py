"""Cross entropy of the supervised tokens, a chunk of logits at a time.

The gradient with respect to the input is made in the forward pass, chunk by chunk, so the logits of a chunk live once, in place, and no
more than one chunk of them is ever alive. The formulas are those of softmax cross entropy; with p = softmax(z),

    loss = logsumexp(z) - z[target]        dloss/dz = p - onehot(target)

and, where the model scales and caps its logits, z = cap tanh(a z' / cap), dz/dz' = a (1 - (z / cap)^2). What is made of the losses behind
(a mean, an objective of whole answers) reaches the gradient in the backward pass as one factor per token, so nothing goes through the head
twice.

Legend: N supervised tokens, D hidden features, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

CHUNK_BYTES = 64 * 2**20
"""Size of the chunk of float32 logits that is alive at a time."""


@dataclass(frozen=True)
class LogitTransform:
    """What a model does to its logits behind the head: z = cap tanh(scale z' / cap)."""

    scale: float = 1.0
    cap: float | None = None

    def apply_(self, logits: Tensor) -> Tensor:
        """Scale and cap, in place."""
        if self.scale != 1.0:
            logits.mul_(self.scale)
        return logits if self.cap is None else logits.div_(self.cap).tanh_().mul_(self.cap)

    def derivative(self, logits: Tensor) -> Tensor | float:
        """dz/dz' at capped logits z."""
        return self.scale if self.cap is None else (logits / self.cap).square_().neg_().add_(1.0).mul_(self.scale)


def linear_cross_entropy(
    hidden_ND: Tensor,
    head_VD: Tensor,
    bias_V: Tensor | None,
    target_N: Tensor,
    logit_transform: LogitTransform = LogitTransform(),
) -> Tensor:
    """The loss of each token [N] of a frozen head on hidden states, in float32 or wider. The head gets no gradient."""
    return _Losses.apply(
        hidden_ND, target_N, head_VD.detach(), None if bias_V is None else bias_V.detach(), logit_transform
    )


def cross_entropy(logits_NV: Tensor, target_N: Tensor) -> Tensor:
    """The same for logits that are there already, in the base's dtype; float32 copies are made a chunk at a time."""
    return _Losses.apply(logits_NV, target_N, None, None, LogitTransform())


class _Losses(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, target_N: Tensor, head: Tensor | None, bias: Tensor | None, logit_transform: LogitTransform
    ) -> Tensor:
        exact = torch.float64 if x.dtype == torch.float64 else torch.float32
        vocabulary = x.shape[1] if head is None else head.shape[0]
        size = max(1, CHUNK_BYTES // (vocabulary * exact.itemsize))
        grad = torch.empty_like(x) if ctx.needs_input_grad[0] else None
        losses_N = torch.empty(x.shape[0], dtype=exact, device=x.device)
        for start in range(0, x.shape[0], size):
            part = slice(start, start + size)
            own = None if grad is None else grad[part]
            losses_N[part] = _chunk(x[part], target_N[part], head, bias, logit_transform, exact, own)
        ctx.save_for_backward(grad)
        return losses_N

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        (grad,) = ctx.saved_tensors
        scaled = torch.empty_like(grad)
        return torch.mul(grad, grads[0][:, None], out=scaled), None, None, None, None


def _chunk(
    x: Tensor,
    target: Tensor,
    head: Tensor | None,
    bias: Tensor | None,
    logit_transform: LogitTransform,
    exact: torch.dtype,
    grad: Tensor | None,
) -> Tensor:
    """The losses of a chunk, and its gradient into `grad`. Its logits end here, before those of the next are made."""
    z = x.to(exact, copy=True) if head is None else F.linear(x, head, bias).to(exact)
    losses, dz = _softmax_losses(logit_transform.apply_(z), target, logit_transform, grad is not None)
    if grad is not None and dz is not None:
        grad.copy_(dz if head is None else dz.to(head.dtype) @ head)
    return losses


def _softmax_losses(
    z: Tensor, target: Tensor, logit_transform: LogitTransform, need_grad: bool
) -> tuple[Tensor, Tensor | None]:
    """Losses and, in z's own memory, the gradient before the tail. One pass of exponentials serves both."""
    slope = logit_transform.derivative(z) if need_grad else 1.0
    chosen = z.gather(1, target[:, None])
    highest = z.amax(1, keepdim=True)
    total = z.sub_(highest).exp_().sum(1, keepdim=True)
    losses = (total.log() + highest - chosen)[:, 0]
    if not need_grad:
        return losses, None
    dz = z.div_(total)
    dz[torch.arange(len(target), device=z.device), target] -= 1.0
    return losses, dz if isinstance(slope, float) and slope == 1.0 else dz.mul_(slope)

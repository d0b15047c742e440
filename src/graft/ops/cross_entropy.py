"""Cross-entropy of the supervised tokens, computed one chunk of logits at a time.

The forward pass also computes the gradient with respect to the input, chunk by chunk and in the memory of the logits, so that no more than
one chunk of logits exists at any time. With p = softmax(z),

    loss = logsumexp(z) - z[target]        dloss/dz = p - onehot(target)

If the model scales and caps its logits, z = cap tanh(scale z' / cap) and dz/dz' = scale (1 - (z / cap)^2).

Whatever is computed from the losses later (a mean, an objective over whole answers) reaches the gradient in backward as one factor per
token, so nothing passes through the head twice.

Example: z = [1, 2, 3] with target 1. p = [0.09, 0.24, 0.67], the loss is 3.41 - 2 = 1.41, and the gradient is [0.09, -0.76, 0.67]. If the
objective is the mean over four tokens, backward multiplies this row by 1/4.

Example of sizes: 8192 supervised tokens and a vocabulary of 128,256 make 3.9 GiB of float32 logits. A chunk of 64 MiB holds 130 tokens, and
63 full chunks and a short one follow each other.

Legend: N supervised tokens, D hidden features, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

CHUNK_BYTES = 64 * 2**20
"""Size of a chunk of float32 logits."""


@dataclass(frozen=True)
class LogitTransform:
    """What a model does to its logits after the head: z = cap tanh(scale z' / cap)."""

    scale: float = 1.0
    cap: float | None = None

    def apply_(self, logits: Tensor) -> Tensor:
        """Scale and cap the logits in place."""
        if self.scale != 1.0:
            logits.mul_(self.scale)
        return logits if self.cap is None else logits.div_(self.cap).tanh_().mul_(self.cap)

    def derivative(self, logits: Tensor) -> Tensor | float:
        """Return dz/dz' at the capped logits z."""
        return self.scale if self.cap is None else (logits / self.cap).square_().neg_().add_(1.0).mul_(self.scale)


def linear_cross_entropy(
    hidden_ND: Tensor,
    head_VD: Tensor,
    bias_V: Tensor | None,
    target_N: Tensor,
    logit_transform: LogitTransform = LogitTransform(),
) -> Tensor:
    """Return the loss of each token [N] in float32 (float64 for float64 input), from hidden states and a frozen head.

    The head gets no gradient.
    """
    return _Losses.apply(
        hidden_ND, target_N, head_VD.detach(), None if bias_V is None else bias_V.detach(), logit_transform
    )


def cross_entropy(logits_NV: Tensor, target_N: Tensor) -> Tensor:
    """Return the loss of each token [N] from finished logits in the base's dtype. Only one chunk at a time is copied to float32."""
    return _Losses.apply(logits_NV, target_N, None, None, LogitTransform())


class _Losses(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, target_N: Tensor, head: Tensor | None, bias: Tensor | None, logit_transform: LogitTransform
    ) -> Tensor:
        exact = torch.float64 if x.dtype == torch.float64 else torch.float32  # dtype of the softmax and the losses
        vocabulary = x.shape[1] if head is None else head.shape[0]
        size = max(1, CHUNK_BYTES // (vocabulary * exact.itemsize))  # tokens per chunk
        grad = torch.empty_like(x) if ctx.needs_input_grad[0] else None
        losses_N = torch.empty(x.shape[0], dtype=exact, device=x.device)
        for start in range(0, x.shape[0], size):
            chunk = slice(start, start + size)
            grad_chunk = None if grad is None else grad[chunk]
            losses_N[chunk] = _chunk_losses(x[chunk], target_N[chunk], head, bias, logit_transform, exact, grad_chunk)
        ctx.save_for_backward(grad)
        return losses_N

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        (grad,) = ctx.saved_tensors  # [N, D], or [N, V] of finished logits
        # `out=` keeps the product in grad's dtype. Without it float32 factors would make a bfloat16 gradient float32.
        scaled = torch.empty_like(grad)
        return torch.mul(grad, grads[0][:, None], out=scaled), None, None, None, None


def _chunk_losses(
    x: Tensor,
    target: Tensor,
    head: Tensor | None,
    bias: Tensor | None,
    logit_transform: LogitTransform,
    exact: torch.dtype,
    grad: Tensor | None,
) -> Tensor:
    """Return the losses of a chunk and write its gradient into `grad`. The chunk's logits are freed before the next chunk makes its own."""
    # z is overwritten below, so finished logits are copied even where they have the dtype already.
    z = x.to(exact, copy=True) if head is None else F.linear(x, head, bias).to(exact)  # [chunk, V]
    losses, dz = _softmax_losses(logit_transform.apply_(z), target, logit_transform, grad is not None)
    if grad is not None and dz is not None:
        grad.copy_(dz if head is None else dz.to(head.dtype) @ head)
    return losses


def _softmax_losses(
    z: Tensor, target: Tensor, logit_transform: LogitTransform, need_grad: bool
) -> tuple[Tensor, Tensor | None]:
    """Return the losses and, in z's own memory, the gradient with respect to the logits before `logit_transform`.

    For z = [1, 2, 3] and target 1: target_z is 2 and highest is 3; z becomes exp(z - 3) = [0.14, 0.37, 1], total is 1.50, and the loss is
    log(1.50) + 3 - 2 = 1.41. z / total is the softmax, from which the target's entry loses 1.
    """
    slope = logit_transform.derivative(z) if need_grad else 1.0  # before z is overwritten
    target_z = z.gather(1, target[:, None])
    highest = z.amax(1, keepdim=True)  # subtracted so that exp cannot overflow
    total = z.sub_(highest).exp_().sum(1, keepdim=True)
    losses = (total.log() + highest - target_z)[:, 0]
    if not need_grad:
        return losses, None
    dz = z.div_(total)
    dz[torch.arange(len(target), device=z.device), target] -= 1.0
    return losses, dz if isinstance(slope, float) and slope == 1.0 else dz.mul_(slope)

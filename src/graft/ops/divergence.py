"""The losses of targets that two passes predict: the cross entropy of the first, and how far the two distributions are apart.

With p and q the softmax of the two passes' logits z and w, a target y, V entries and a label smoothing e:

    loss         -(1 - e) log p(y) - e / V sum_v log p(v)
    divergence   (KL(q || p) + KL(p || q)) / 2 = sum_v (p(v) - q(v)) (log p(v) - log q(v)) / 2

In the divergence, the first distribution of each KL is a constant for the gradient, so its gradients are (p - q) / 2 with respect to z and
the opposite for w (AdaMix: Wang et al. 2022, arXiv 2205.12410).

As in `cross_entropy.py`, the head makes a chunk of logits at a time, and the gradients of unit losses are made with them; what is computed
from the losses reaches them in backward as a factor per target.

Legend: P targets, D hidden features, V vocabulary or classes.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from graft.ops.cross_entropy import CHUNK_BYTES, LogitTransform

PASSES = 2
"""The logits of this many passes make a chunk."""


def two_pass_losses(
    first_PD: Tensor,
    again_PD: Tensor,
    target_P: Tensor,
    smoothing_P: Tensor,
    head_VD: Tensor | None = None,
    bias_V: Tensor | None = None,
    logit_transform: LogitTransform = LogitTransform(),  # noqa: B008
) -> tuple[Tensor, Tensor]:
    """Return losses and divergences, each [P], in float32 (float64 for float64 input). The head gets no gradient.

    first_PD, again_PD: hidden states of the two passes, or finished logits [P, V] if there is no head.
    """
    frozen = (None if each is None else each.detach() for each in (head_VD, bias_V))
    return _TwoPasses.apply(first_PD, again_PD, target_P, smoothing_P, *frozen, logit_transform)


class _TwoPasses(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, y: Tensor, target: Tensor, smoothing: Tensor, head: Tensor | None, bias: Tensor | None,
        transform: LogitTransform,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        exact = torch.float64 if x.dtype == torch.float64 else torch.float32
        vocabulary = x.shape[1] if head is None else head.shape[0]
        size = max(1, CHUNK_BYTES // (PASSES * vocabulary * exact.itemsize))  # targets per chunk
        losses, divergences = (torch.empty(len(x), dtype=exact, device=x.device) for _ in range(2))
        # Without a cap, the gradient of a divergence is the same for both passes but for its sign, so it goes through the head once.
        kept = 0 if not any(ctx.needs_input_grad[:2]) else 2 if transform.cap is None else 3
        grads = [torch.empty_like(x) for _ in range(kept)]
        smoothed = bool(smoothing.any())
        for start in range(0, len(x), size):
            at = slice(start, start + size)
            # Both passes go through the head in one product, and so do their gradients, so that its weight is read from memory once.
            both = torch.cat([x[at], y[at]])
            both = transform.apply_((both if head is None else F.linear(both, head, bias)).to(exact))
            chances, slope = both.softmax(1), transform.derivative(both)
            (z, w), (p, q) = both.chunk(2), chances.chunk(2)
            # log sum exp, from the likeliest entry: where p is far from 0, so is its logarithm from the limits of the number format.
            total_z, total_w = (both.amax(1, True) - chances.amax(1, True).log()).chunk(2)
            e = smoothing[at].to(exact)
            losses[at] = (total_z - z.gather(1, target[at][:, None]))[:, 0]
            if smoothed:
                losses[at] = (1 - e) * losses[at] - e * (z.mean(1) - total_z[:, 0])
            # In place where it can be: on a CPU these steps take as long as a product with a large vocabulary's head.
            apart = torch.sub(p, q, out=q)
            divergences[at] = torch.linalg.vecdot(apart, z.sub_(w).sub_(total_z - total_w)) / 2
            if grads:
                p = p.sub_((e / vocabulary)[:, None]) if smoothed else p
                p.scatter_add_(1, target[at][:, None], (e - 1)[:, None])
                if isinstance(slope, Tensor):
                    rows = torch.cat([chances, apart]).mul_(torch.cat([slope[: len(z)], slope]))  # own, towards, back
                else:
                    rows = chances if slope == 1.0 else chances.mul_(slope)  # own, towards
                rows = rows if head is None else rows.to(head.dtype) @ head
                for grad, found, factor in zip(grads, rows.chunk(kept), (1.0, 0.5, -0.5), strict=False):
                    torch.mul(found, factor, out=grad[at])
        ctx.save_for_backward(*grads)
        return losses, divergences

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        # The gradients of a loss and of a divergence for the first pass, and for the second one if they differ; [P, D] each.
        own, towards, *back = ctx.saved_tensors
        loss, divergence = (each[:, None].to(own.dtype) for each in grads)
        second = back[0] if back else -towards
        return own * loss + towards * divergence, second * divergence, None, None, None, None, None

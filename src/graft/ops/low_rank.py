"""The low-rank part of a linear layer as one autograd node: h + s B A dropout(x), for one adapter, or for several on rows of their own.

For the rows i of one adapter, with its dropout mask M, S = s (M x) A^T, G the gradient of the output and T = s G B:

    h' = h + S B^T        dB = G^T S        dA = T^T (M x)        dx = M (T A)        dh = G

Kept for backward are x, which is one tensor for all adapters and all layers that read it, and the S of rank R. Masks are drawn again
from the seeds of the pass, where autograd would keep two tensors of x's size for each adapter; the gradient of x is written row by row
into one tensor, where autograd would fill one with zeros for each adapter and add them up. Equations: Ye et al. 2023, "mLoRA"
(arXiv 2312.02515). `fused_base.py` takes the frozen layer itself into the node; `grouped.py` computes several terms by one product where
the device has a kernel for it, and here they are computed one after another.

Without seeds, in compiled code, under function transforms and where the factors lie on another device (then it is an error) the same is
computed by plain operations.

Legend: I input features, O output features, R rank, N tokens of one adapter's rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from graft.ops.low_rank_grouped import add_grouped_, grouped_gradients, together
from graft.ops.low_rank_update import LowRankUpdate, flat


def add_low_rank(x: Tensor, h: Tensor, updates: Sequence[LowRankUpdate], in_place: bool = False) -> Tensor:
    """h with every term added to its rows, which no two terms share. x: [..., I] in h's dtype, h: [..., O] -> [..., O].

    `in_place` adds into h itself: only for an h that nobody else needs. The gradient is not differentiable again.
    """
    if not one_node(updates, h.device):
        for update in updates:
            if update.rows is None:
                h = h + update.plain(x)
            else:
                at = torch.arange(update.rows.start, update.rows.stop, device=h.device)
                h = h.index_add(1 if update.ctx.flat else 0, at, update.plain(update.of(x)))
        return h
    return _AddLowRank.apply(x, h, updates, in_place and h.is_contiguous() and not h._is_view(), *factors_of(updates))


def one_node(updates: Sequence[LowRankUpdate], device: torch.device) -> bool:
    """Whether terms can be computed by a node of ours: masks can be drawn again, and nobody looks into what runs."""
    seeded = all(update.p == 0.0 or update.ctx.seeds is not None for update in updates)
    here = all(
        update.A.device == update.B.device == device for update in updates
    )  # in place, tensors without data add nothing
    return seeded and here and not (torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active())


def factors_of(updates: Sequence[LowRankUpdate]) -> list[Tensor]:
    """A and B of each term."""
    return [factor for update in updates for factor in (update.A, update.B)]


def makes_its_output(host: nn.Module) -> bool:
    """Whether nothing but what comes next holds a module's output, not even its own backward: a linear layer as it is."""
    return getattr(type(host), "graft_base", None) is nn.Linear and "forward" not in host.__dict__


class _AddLowRank(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, h: Tensor, updates: Sequence[LowRankUpdate], in_place: bool, *factors: Tensor
    ) -> Tensor:
        out = h if in_place else h.clone(memory_format=torch.contiguous_format)
        lows = add_terms_(out, x, updates)
        if in_place:
            ctx.mark_dirty(h)
        ctx.updates = updates
        ctx.save_for_backward(x, *lows, *factors)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Any:
        updates, (grad,), (x, *saved) = ctx.updates, grads, ctx.saved_tensors
        covered = sum(update.of(grad).numel() for update in updates) == grad.numel()
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x = (torch.empty if covered else torch.zeros)(x.shape, dtype=x.dtype, device=x.device)
        made = factor_gradients(updates, grad, x, saved, ctx.needs_input_grad[4:], grad_x, fresh=True)
        return grad_x, grad, None, None, *made


def add_terms_(out: Tensor, x: Tensor, updates: Sequence[LowRankUpdate]) -> list[Tensor]:
    """Add each term to its rows of a contiguous tensor [..., O]; the S [N, R] of each, which a grouped product may have filled up to a
    greater R."""
    lows: dict[int, Tensor] = {}
    for numbers in together(updates, x, out.shape[-1]):
        own = [updates[number] for number in numbers]
        made = add_grouped_(out, x, own) if len(own) > 1 else [_add_term_(out, x, own[0])]
        lows.update(zip(numbers, made, strict=True))
    return [lows[number] for number in range(len(updates))]


def factor_gradients(
    updates: Sequence[LowRankUpdate], grad: Tensor, x: Tensor, saved: Sequence[Tensor], needs: Sequence[bool],
    grad_x: Tensor | None, fresh: bool,
) -> list[Tensor | None]:  # fmt: skip
    """dA and dB of each term; dx goes to its rows of grad_x: in place of what is there if `fresh`, else added.

    grad [..., O]; saved: the S of each term, then the factors; needs: whether each factor wants its gradient.
    """
    lows, factors, made = saved[: len(updates)], saved[len(updates) :], list[Tensor | None]([None] * len(needs))
    for numbers in together(updates, x, grad.shape[-1]):
        at = [place for number in numbers for place in (2 * number, 2 * number + 1)]
        own, wants = [factors[place] for place in at], [needs[place] for place in at]
        here, low = [updates[number] for number in numbers], [lows[number] for number in numbers]
        if len(here) > 1:
            found = grouped_gradients(here, grad, x, low, own, wants, grad_x, fresh)
        else:
            found = _term_gradients(here[0], grad, x, low[0], own, wants, grad_x, fresh)
        for place, gradient in zip(at, found, strict=True):
            made[place] = gradient
    return made


def _add_term_(out: Tensor, x: Tensor, update: LowRankUpdate) -> Tensor:
    x_NI = flat(update.ctx.dropout(update.of(x), update.p, update.site_index))
    low_NR = torch.mm(x_NI, update.A.to(x.dtype).t()).mul_(update.scale)
    update.of(out).view(-1, out.shape[-1]).addmm_(low_NR, update.B.to(x.dtype).t())
    return low_NR


def _term_gradients(
    update: LowRankUpdate, grad: Tensor, x: Tensor, low_NR: Tensor, factors: Sequence[Tensor], needs: Sequence[bool],
    grad_x: Tensor | None, fresh: bool,
) -> tuple[Tensor | None, Tensor | None]:  # fmt: skip
    (A, B), keep, grad_NO = factors, update.kept(x), flat(update.of(grad))
    low_grad_NR = torch.mm(grad_NO, B.to(x.dtype)).mul_(update.scale)
    x_NI = flat(update.of(x) if keep is None else update.of(x) * keep)
    dA = torch.mm(low_grad_NR.t(), x_NI).to(A.dtype) if needs[0] else None
    dB = torch.mm(grad_NO.t(), low_NR).to(B.dtype) if needs[1] else None
    if grad_x is not None:
        _add_input_gradient(update.of(grad_x).view(-1, x.shape[-1]), low_grad_NR, A.to(x.dtype), keep, fresh)
    return dA, dB


def _add_input_gradient(part_NI: Tensor, low_grad_NR: Tensor, A: Tensor, keep: Tensor | None, fresh: bool) -> None:
    """M (T A), written or added."""
    if fresh:
        torch.mm(low_grad_NR, A, out=part_NI)
        if keep is not None:
            part_NI.mul_(flat(keep))
    elif keep is None:
        part_NI.addmm_(low_grad_NR, A)
    else:
        part_NI.addcmul_(torch.mm(low_grad_NR, A), flat(keep))

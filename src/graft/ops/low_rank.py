"""The low-rank part of a linear layer as one autograd node: h + s B A dropout(x), for one adapter or for several on their own rows.

For the rows of one adapter, let M be the dropout mask, G the gradient of the output, S = s (M x) A^T and T = s G B. Then

    h' = h + S B^T        dB = G^T S        dA = T^T (M x)        dx = M (T A)        dh = G

The node saves two things for backward: x, which is one tensor for all adapters and for all layers that read it, and S, which has only R
columns. It draws the masks again from the seeds of the pass, where autograd saves M and M x for every adapter. It writes the gradient of x
row by row into one tensor, where autograd pads each adapter's gradient with zeros to the size of x and adds them up.

Example: x is [1, 4096, 4096] in bfloat16, and two adapters of rank 8 have 2048 tokens each. The node saves x (32 MiB, shared by q, k and v)
and two S [2048, 8] of 32 KiB. Autograd saves M and M x of each adapter instead: four tensors of 16 MiB in every layer.

The equations are those of Ye et al. 2023, "mLoRA" (arXiv 2312.02515). `low_rank_linear.py` makes the frozen layer a part of the node.
`low_rank_grouped.py` computes several updates in one product where the device has a kernel for it; here they are computed one by one.

Plain operations compute the same where the node cannot: for dropout without seeds, in compiled code, under function transforms, and where
the factors lie on another device (which then raises torch's own error).

Legend: I input features, O output features, R rank, N tokens of one adapter's rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from graft.architectures.torch_internals import in_function_transform
from graft.ops.low_rank_grouped import add_grouped_, grouped_gradients, product_groups
from graft.ops.low_rank_stack import StackedUpdate
from graft.ops.low_rank_update import LowRankUpdate

Update = LowRankUpdate | StackedUpdate
"""What a node adds to the output of a layer."""


def add_low_rank(x: Tensor, h: Tensor, updates: Sequence[Update], in_place: bool = False) -> Tensor:
    """Add every update to its rows of h. No two updates may share a row. x: [..., I] in h's dtype, h: [..., O] -> [..., O].

    With `in_place` the updates are added to h itself, which is safe only if nothing else needs h. The gradient cannot be differentiated
    again.
    """
    if not one_node(updates, h.device):
        for update in updates:
            assert isinstance(update, LowRankUpdate)  # a stack is made only where a node can compute it
            if update.rows is None:
                h = h + update.plain(x)
            else:
                at = torch.arange(update.rows.start, update.rows.stop, device=h.device)
                h = h.index_add(1 if update.ctx.flat else 0, at, update.plain(update.rows_of(x)))
        return h
    in_place = in_place and h.is_contiguous() and not h._is_view()
    if not torch.is_grad_enabled():  # no node: its call costs much beside the products of one token
        return _added(x, h, updates, in_place)[0]
    return _AddLowRank.apply(x, h, updates, in_place, *factors_of(updates))


def one_node(updates: Sequence[Update], device: torch.device) -> bool:
    """Whether one node can compute the updates: dropout masks can be drawn again, and neither a compiler nor a transform traces us."""
    seeded = all(update.redrawn for update in updates)
    # Meta factors on a real h must take the plain path and fail there: an in-place product with them would add nothing, in silence.
    same_device = all(update.A.device == update.B.device == device for update in updates)
    return seeded and same_device and not (torch.compiler.is_compiling() or in_function_transform())


def factors_of(updates: Sequence[Update]) -> list[Tensor]:
    """Return A and B of each update, flattened: [A_0, B_0, A_1, B_1, ...]."""
    return [factor for update in updates for factor in (update.A, update.B)]


def makes_its_output(host: nn.Module) -> bool:
    """Whether the module's output is safe to overwrite. A plain linear layer's is: not even its own backward reads it."""
    return getattr(type(host), "graft_base", None) is nn.Linear and "forward" not in host.__dict__


class _AddLowRank(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, h: Tensor, updates: Sequence[Update], in_place: bool, *factors: Tensor) -> Tensor:
        out, lows = _added(x, h, updates, in_place)
        if in_place:
            ctx.mark_dirty(h)
        ctx.updates = updates
        # Two updates of rank 4 and 8 on 5 and 3 tokens save x, S_0 [5, 4], S_1 [3, 8], A_0, B_0, A_1, B_1.
        # Autograd raises if an optimiser step changes one of them in place before backward.
        ctx.save_for_backward(x, *lows, *factors)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Any:
        updates, (grad,), (x, *saved) = ctx.updates, grads, ctx.saved_tensors
        # Each update overwrites the gradient of its own rows. Rows that no update covers need zeros: if adapter a has rows 0 and 1 of
        # four, b has row 2 and row 3 runs on the base alone, then row 3 of x gets its gradient only through the frozen layer.
        covered = sum(update.count(grad) for update in updates) == grad.numel()
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x = (torch.empty if covered else torch.zeros)(x.shape, dtype=x.dtype, device=x.device)
        # Inputs 0 to 3 are x, h, updates and in_place; the factors follow.
        factor_grads = factor_gradients(updates, grad, x, saved, ctx.needs_input_grad[4:], grad_x, overwrite=True)
        return grad_x, grad, None, None, *factor_grads


def _added(x: Tensor, h: Tensor, updates: Sequence[Update], in_place: bool) -> tuple[Tensor, list[Tensor]]:
    """Return h, or a copy of it, with every update added, and the S of each."""
    out = h if in_place else h.clone(memory_format=torch.contiguous_format)
    return out, add_updates_(out, x, updates)


def add_updates_(out: Tensor, x: Tensor, updates: Sequence[Update]) -> list[Tensor]:
    """Add each update to its rows of a contiguous tensor [..., O], and return the S [N, R] of each.

    A grouped product may have padded an S with zero columns.
    """
    lows: dict[int, Tensor] = {}
    for numbers in product_groups(updates, x, out.shape[-1]):
        own = [updates[number] for number in numbers]
        own_lows = add_grouped_(out, x, own) if len(own) > 1 else [own[0].add_(out, x)]  # pyright: ignore[reportArgumentType]
        lows.update(zip(numbers, own_lows, strict=True))
    return [lows[number] for number in range(len(updates))]


def factor_gradients(
    updates: Sequence[Update], grad: Tensor, x: Tensor, saved: Sequence[Tensor], needs: Sequence[bool],
    grad_x: Tensor | None, overwrite: bool,
) -> list[Tensor | None]:  # fmt: skip
    """Return dA and dB of each update, and put dx into its rows of `grad_x`.

    Args:
        grad: Gradient of the output [..., O].
        saved: The S of each update, then `factors_of(updates)`.
        needs: Whether each factor needs its gradient, in the order of `factors_of`.
        grad_x: Gradient of the input [..., I], or None if the input needs none.
        overwrite: Whether dx replaces what `grad_x` holds in these rows; otherwise it is added.
    """
    lows, factors = saved[: len(updates)], saved[len(updates) :]
    factor_grads = list[Tensor | None]([None] * len(needs))
    for numbers in product_groups(updates, x, grad.shape[-1]):
        # Update number n owns the factors at 2 n and 2 n + 1: updates [0, 2] own [0, 1, 4, 5].
        at = [place for number in numbers for place in (2 * number, 2 * number + 1)]
        own_factors, own_needs = [factors[place] for place in at], [needs[place] for place in at]
        own, own_lows = [updates[number] for number in numbers], [lows[number] for number in numbers]
        if len(own) > 1:
            own_grads = grouped_gradients(own, grad, x, own_lows, own_factors, own_needs, grad_x, overwrite)  # pyright: ignore[reportArgumentType]
        else:
            own_grads = own[0].gradients(grad, x, own_lows[0], own_factors, own_needs, grad_x, overwrite)
        for place, gradient in zip(at, own_grads, strict=True):
            factor_grads[place] = gradient
    return factor_grads

"""The low-rank updates of many adapters of one shape as batched products: the work of the host does not grow with their number.

The factors of all adapters of a stack are views of one tensor, [J, R, I] and [J, O, R], and so are their gradients. For the block of
adapters j whose rows a pass has (`routing/stacked.py`), each line is one product:

    S_j = s_j x_j A_j^T     h_j' = h_j + S_j B_j^T     T_j = s_j G_j B_j     dA_j += T_j^T x_j     dB_j += G_j^T S_j     dx_j = T_j A_j

The gradients are added where they lie, so autograd sees none of the factors: one tensor, the anchor, stands for all of them and tells it
that the output needs a gradient.

Tokens are padded to [J, N, I] where adapters have unequally many. Where torch has a kernel for grouped products (`low_rank_grouped.py`),
nothing is padded, and the factors are views that are cast to the dtype of x at most.

Ye et al. 2023, "mLoRA" (arXiv 2312.02515).

Legend: I input features, O output features, R rank, J adapters, M tokens of all their rows, N tokens of the adapter that has most.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from graft.ops.low_rank_grouped import ALIGNMENT, MAX_UPDATES, grouped_product, has_kernel, row_ends
from graft.ops.low_rank_update import as_matrix
from graft.routing.stacked import Block

COPIED = 1 << 17
"""Numbers that padding may copy for an adapter on a CPU: beyond that, the loop over adapters is quicker."""


@dataclass(frozen=True, eq=False)
class StackedFactors:
    """The factors of one module in all slots of a stack."""

    A_JRI: Tensor
    B_JOR: Tensor
    dA_JRI: Tensor
    dB_JOR: Tensor
    """Where gradients are added."""
    scale_J: Tensor
    dropouts: tuple[float, ...]
    site_index: int
    anchor: Tensor
    """A leaf that requires a gradient, and gets none."""
    written: Callable[[slice | Tensor], None]
    """Called with the slots whose gradients were added to."""

    def update(self, block: Block, x: Tensor) -> StackedUpdate | None:
        """Return the updates of a block's adapters; None where one after the other is quicker, or where dropout cannot be drawn again."""
        own = self.dropouts[block.slots] if isinstance(block.slots, slice) else self._picked(block.slots)
        if any(own) and any(ctx.seeds is None for _, ctx in block.contexts):
            return None
        (_, num_out, rank), num_in = self.B_JOR.shape, self.A_JRI.shape[-1]
        aligned = not any(each % ALIGNMENT for each in (num_in, num_out, rank))
        jagged = aligned and len(block.counts) <= MAX_UPDATES and has_kernel(x)
        copies = block.places_M is not None or block.span is None
        if not jagged and copies and x.device.type == "cpu" and block.width * (num_in + num_out) > COPIED:
            return None
        return StackedUpdate(self, block, own if any(own) else None, jagged)

    def _picked(self, slots: Tensor) -> tuple[float, ...]:
        return tuple(self.dropouts[slot] for slot in slots.tolist()) if any(self.dropouts) else ()


@dataclass(frozen=True, eq=False)
class StackedUpdate:
    """The updates s_j B_j A_j dropout(x_j) of the adapters of a block. It takes the place of a `LowRankUpdate` in the nodes."""

    stacked: ClassVar[bool] = True
    redrawn: ClassVar[bool] = True

    factors: StackedFactors
    block: Block
    dropouts: tuple[float, ...] | None
    """Of each adapter; None if there is none."""
    jagged: bool
    """Whether a grouped product takes the tokens as they lie."""

    @property
    def A(self) -> Tensor:
        """What stands for the factors in autograd."""
        return self.factors.anchor

    B = A

    def count(self, tensor: Tensor) -> int:
        """Return how many numbers of a tensor are in the rows of the block."""
        return sum(self.block.counts) * tensor.shape[-1]

    def add_(self, out: Tensor, x: Tensor) -> Tensor:
        """Add the updates to their rows of a contiguous tensor [..., O], and return S."""
        x_rows, (A, B, scale) = self._input(x, self._mask(x)), self._operands(x.dtype)
        low = self._product(x_rows, A.mT).mul_(scale)
        self.block.put(as_matrix(out), self._rows(self._product(low, B.mT)))
        return low

    def gradients(
        self, grad: Tensor, x: Tensor, low: Tensor, factors: Sequence[Tensor], needs: Sequence[bool],
        grad_x: Tensor | None, overwrite: bool,
    ) -> tuple[None, None]:  # fmt: skip
        """Add the gradients of the factors where they lie, and put dx into the rows of `grad_x`. See `low_rank.factor_gradients`."""
        grad_rows, (A, B, scale), mask_MI = self._laid(grad), self._operands(x.dtype), self._mask(x)
        low_grad = self._product(grad_rows, B).mul_(scale)  # T
        self._add(self.factors.dA_JRI, low_grad, self._input(x, mask_MI))
        self._add(self.factors.dB_JOR, grad_rows, low)
        self.factors.written(self.block.slots)
        if grad_x is not None:
            dx_MI = self._rows(self._product(low_grad, A))
            if mask_MI is not None:
                dx_MI = dx_MI * mask_MI
            self.block.put(as_matrix(grad_x), dx_MI, overwrite)
        return None, None

    def _operands(self, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
        """A, B and the scales of the block's adapters: views where their slots follow one another and the dtype is that of x."""
        A, B, scale_J = (self._own(each) for each in (self.factors.A_JRI, self.factors.B_JOR, self.factors.scale_J))
        scale_J = scale_J.to(dtype)
        if not self.jagged:
            return A.to(dtype), B.to(dtype), scale_J[:, None, None]
        counts = torch.tensor(self.block.counts, device=scale_J.device)
        return A.to(dtype), B.to(dtype), scale_J.repeat_interleave(counts, output_size=sum(self.block.counts))[:, None]

    def _own(self, tensor: Tensor) -> Tensor:
        slots = self.block.slots
        return tensor[slots] if isinstance(slots, slice) else tensor.index_select(0, slots)

    def _laid(self, x: Tensor) -> Tensor:
        """The rows of x [..., D] as the products take them: [J, N, D] or [M, D]."""
        rows_MD = self.block.rows(as_matrix(x))
        return rows_MD if self.jagged else self.block.padded(rows_MD)

    def _input(self, x: Tensor, mask_MI: Tensor | None) -> Tensor:
        if mask_MI is None:
            return self._laid(x)
        dropped_MI = self.block.rows(as_matrix(x)) * mask_MI
        return dropped_MI if self.jagged else self.block.padded(dropped_MI)

    def _mask(self, x: Tensor) -> Tensor | None:
        """What dropout multiplies the tokens [M, I] by; None without dropout. Every call gives the same."""
        if self.dropouts is None:
            return None
        found = []
        for (rows, ctx), p in zip(self.block.contexts, self.dropouts, strict=True):
            own = x.narrow(1 if ctx.flat else 0, rows.start, rows.stop - rows.start)
            found.append(as_matrix(ctx.dropout_mask(own, p, self.factors.site_index) if p else torch.ones_like(own)))
        return torch.cat(found)

    def _rows(self, products: Tensor) -> Tensor:
        return products if self.jagged else self.block.unpadded(products)

    def _product(self, a: Tensor, b: Tensor) -> Tensor:
        """Multiply the rows of each adapter by its own matrix."""
        return grouped_product(a, b, self._ends(a)) if self.jagged else torch.bmm(a, b)

    def _add(self, total_JDE: Tensor, a: Tensor, b: Tensor) -> None:
        """Add a_j^T b_j of each adapter to its slot."""
        if self.jagged:
            sums: Any = grouped_product(a.t(), b, self._ends(a))
        else:
            sums = torch.bmm(a.mT, b)
        slots = self.block.slots
        if isinstance(slots, slice):
            total_JDE[slots].add_(sums)
        else:
            total_JDE.index_add_(0, slots, sums.to(total_JDE.dtype))

    def _ends(self, x: Tensor) -> Tensor:
        return row_ends(self.block.counts, x.device)

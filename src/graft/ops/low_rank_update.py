"""What a low-rank adapter adds to the output of a linear layer, as data: factors, scale, dropout and rows.

Legend: I input features, O output features, R rank, N tokens of one adapter's rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from graft.routing.context import AdapterContext


@dataclass(frozen=True, eq=False)
class LowRankUpdate:
    """The update s B A dropout(x) on some rows of the batch. The updates at one module never share a row."""

    stacked: ClassVar[bool] = False
    """Whether it is the updates of several adapters (`low_rank_stack.py`)."""

    A: Tensor
    """[R, I]"""
    B: Tensor
    """[O, R]"""
    scale: float
    p: float
    """Dropout probability; 0 outside of training."""
    site_index: int
    """Number of the site. Together with a row's seed it is the key of the dropout mask."""
    ctx: AdapterContext
    rows: slice | None = None
    """The rows that the update is added to: a slice of dimension 1 in a packed pass, of dimension 0 otherwise. None: all rows."""

    @property
    def dim(self) -> int:
        """The dimension along which rows lie."""
        return 1 if self.ctx.flat else 0

    def rows_of(self, tensor: Tensor) -> Tensor:
        """Return this update's rows of a tensor, as a view."""
        if self.rows is None:
            return tensor
        return tensor.narrow(self.dim, self.rows.start, self.rows.stop - self.rows.start)

    def dropout_mask(self, x: Tensor) -> Tensor | None:
        """Return what seeded dropout multiplies this update's rows of x by (0 or 1 / (1 - p)), or None without dropout."""
        return self.ctx.dropout_mask(self.rows_of(x), self.p, self.site_index) if self.p else None

    def plain(self, x: Tensor, gate: Tensor | None = None) -> Tensor:
        """Compute the update with operations that autograd differentiates. x: the update's own rows [..., I] -> [..., O].

        gate: scales each token of the update, [..., 1]. It costs R numbers a token here, and O behind B.
        """
        low_R = F.linear(self.ctx.dropout(x, self.p, self.site_index), self.A.to(x.dtype))  # [..., R]
        scale = self.scale if gate is None else gate * self.scale
        return F.linear(low_R * scale, self.B.to(x.dtype))  # [..., O]

    @property
    def redrawn(self) -> bool:
        """Whether every call draws the same dropout mask."""
        return self.p == 0.0 or self.ctx.seeds is not None

    def count(self, tensor: Tensor) -> int:
        """Return how many numbers of a tensor are in this update's rows."""
        return self.rows_of(tensor).numel()

    def add_(self, out: Tensor, x: Tensor) -> Tensor:
        """Add s (M x) A^T B^T to the update's rows of a contiguous tensor [..., O], and return S = s (M x) A^T [N, R]."""
        x_NI = as_matrix(self.ctx.dropout(self.rows_of(x), self.p, self.site_index))
        low_NR = torch.mm(x_NI, self.A.to(x.dtype).t()).mul_(self.scale)
        # `rows_of` and `view` only make views, so `addmm_` writes into `out`; `view` raises where a reshape would have to copy.
        self.rows_of(out).view(-1, out.shape[-1]).addmm_(low_NR, self.B.to(x.dtype).t())
        return low_NR

    def gradients(
        self, grad: Tensor, x: Tensor, low_NR: Tensor, factors: Sequence[Tensor], needs: Sequence[bool],
        grad_x: Tensor | None, overwrite: bool,
    ) -> tuple[Tensor | None, Tensor | None]:  # fmt: skip
        """Return dA [R, I] and dB [O, R], and put dx into the rows of `grad_x`. See `low_rank.factor_gradients`.

        low_NR: what `add_` returned. factors: A and B as they were then.
        """
        (A, B), mask, grad_NO = factors, self.dropout_mask(x), as_matrix(self.rows_of(grad))
        low_grad_NR = torch.mm(grad_NO, B.to(x.dtype)).mul_(self.scale)  # T = s G B
        x_NI = as_matrix(self.rows_of(x) if mask is None else self.rows_of(x) * mask)  # M x, made again
        dA = torch.mm(low_grad_NR.t(), x_NI).to(A.dtype) if needs[0] else None
        dB = torch.mm(grad_NO.t(), low_NR).to(B.dtype) if needs[1] else None
        if grad_x is not None:
            own_NI = self.rows_of(grad_x).view(-1, x.shape[-1])
            _put_input_gradient_(own_NI, low_grad_NR, A.to(x.dtype), mask, overwrite)
        return dA, dB


def _put_input_gradient_(own_NI: Tensor, low_grad_NR: Tensor, A: Tensor, mask: Tensor | None, overwrite: bool) -> None:
    """Write dx = M (T A) over `own_NI`, or add it. Only the masked sum needs a tensor of its own."""
    if overwrite:
        torch.mm(low_grad_NR, A, out=own_NI)
        if mask is not None:
            own_NI.mul_(as_matrix(mask))
    elif mask is None:
        own_NI.addmm_(low_grad_NR, A)
    else:
        own_NI.addcmul_(torch.mm(low_grad_NR, A), as_matrix(mask))


def as_matrix(x: Tensor) -> Tensor:
    """Reshape [..., D] to [N, D]."""
    return x.reshape(-1, x.shape[-1])

"""What a low-rank adapter adds to the output of a linear layer, as data: factors, scale, dropout and rows.

Legend: I input features, O output features, R rank, N tokens of one adapter's rows.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor
from torch.nn import functional as F

from graft.routing.context import AdapterContext


@dataclass(frozen=True, eq=False)
class LowRankUpdate:
    """The update s B A dropout(x) on some rows of the batch. The updates at one module never share a row."""

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


def as_matrix(x: Tensor) -> Tensor:
    """Reshape [..., D] to [N, D]."""
    return x.reshape(-1, x.shape[-1])

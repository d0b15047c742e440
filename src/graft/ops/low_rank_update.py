"""What a low-rank adapter adds to a linear layer, as data: factors, scale, dropout, and the rows that it is added to.

Legend: I input features, O output features, R rank, N tokens of one adapter's rows.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor
from torch.nn import functional as F

from graft.routing.context import AdapterContext


@dataclass(frozen=True, eq=False)
class LowRankUpdate:
    """s B A dropout(x) on some rows. Terms at one module have rows of their own: no two share one."""

    A: Tensor
    """[R, I]"""
    B: Tensor
    """[O, R]"""
    scale: float
    p: float
    """Of dropout; 0 outside of training."""
    site_index: int
    """Number of the site; with the row's seed it is the key of the dropout mask."""
    ctx: AdapterContext
    rows: slice | None = None
    """Which rows, along dimension 1 in a flat pass and 0 else; None is all."""

    @property
    def dim(self) -> int:
        """Along which rows lie."""
        return 1 if self.ctx.flat else 0

    def of(self, tensor: Tensor) -> Tensor:
        """This term's rows of a tensor, as a view."""
        if self.rows is None:
            return tensor
        return tensor.narrow(self.dim, self.rows.start, self.rows.stop - self.rows.start)

    def kept(self, x: Tensor) -> Tensor | None:
        """What seeded dropout multiplies this term's rows of x by; None where there is no dropout."""
        return self.ctx.kept(self.of(x), self.p, self.site_index) if self.p else None

    def plain(self, x: Tensor) -> Tensor:
        """The term by operations that autograd knows. x: its own rows [..., I] -> [..., O]."""
        low_R = F.linear(self.ctx.dropout(x, self.p, self.site_index), self.A.to(x.dtype))
        return F.linear(low_R * self.scale, self.B.to(x.dtype))


def flat(x: Tensor) -> Tensor:
    """[..., D] as [N, D]."""
    return x.reshape(-1, x.shape[-1])

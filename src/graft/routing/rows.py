"""Split a tensor into the rows of each adapter, and put the pieces together again.

If every index is a slice, one `split` makes all pieces, and its gradient is one concatenation. Separate views would cost more in backward:
for each piece a tensor of zeros in the whole size, and an addition.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from graft.errors import GraftError
from graft.routing.context import ForwardContext, Index


class RowSplit:
    """Disjoint pieces of tensors along one dimension. If all indices are slices, they must come in ascending order.

    Example: slice(2, 3) and slice(5, 6) of 8 rows. The dimension is split into runs of sizes [2, 1, 2, 1, 2], of which the pieces are
    numbers 1 and 3. `scatter` replaces these two runs and concatenates all five.
    """

    def __init__(self, indices: Sequence[Index], size: int, dim: int) -> None:
        self.indices, self.size, self.dim = indices, size, dim
        self._sizes: list[int] | None = None
        """The sizes of all runs, those between the pieces included. None if an index is not a slice."""
        self._places: list[int] = []
        """The number of each piece's run."""
        if all(isinstance(index, slice) for index in indices):
            self._sizes = self._runs()
        self._split: list[tuple[Tensor, Sequence[Tensor]]] = []
        """(tensor, its runs) of each tensor that was split: several adapters ask for pieces of the same x."""

    def _runs(self) -> list[int]:
        sizes, done = [], 0
        for index in self.indices:
            assert isinstance(index, slice)
            if index.start > done:
                sizes.append(index.start - done)
            self._places.append(len(sizes))
            sizes.append(index.stop - index.start)
            done = index.stop
        return [*sizes, self.size - done] if done < self.size else sizes

    def gather(self, x: Tensor, number: int) -> Tensor:
        """Return a piece of x."""
        if self._sizes is None:
            return gather(x, self.indices[number], self.dim)
        return self._pieces(x)[self._places[number]]

    def _pieces(self, x: Tensor) -> Sequence[Tensor]:
        assert self._sizes is not None
        if len(self._sizes) == 1:
            return [x]
        for known, pieces in self._split:
            if known is x:
                return pieces
        self._split.append((x, x.split(self._sizes, self.dim)))
        return self._split[-1][1]

    def scatter(self, x: Tensor, pieces: Sequence[Tensor]) -> Tensor:
        """Return x with these pieces in place of its own."""
        if self._sizes is None:
            return scatter(x, self.dim, self.indices, pieces)
        runs = list(self._pieces(x))
        for place, piece in zip(self._places, pieces, strict=True):
            runs[place] = piece
        return runs[0] if len(runs) == 1 else torch.cat(runs, self.dim)


def gather(x: Tensor, index: Index, dim: int) -> Tensor:
    """Return the part of x at an index along a dimension."""
    if isinstance(index, slice):
        return x.narrow(dim, index.start, index.stop - index.start)
    return x.index_select(dim, index.to(x.device))


def scatter(x: Tensor, dim: int, indices: Sequence[Index], pieces: Sequence[Tensor]) -> Tensor:
    """Return x with other pieces at these indices, which may come in any order."""
    for index, piece in zip(indices, pieces, strict=True):
        at = torch.arange(index.start, index.stop, device=x.device) if isinstance(index, slice) else index.to(x.device)
        x = x.index_copy(dim, at, piece)
    return x


def by_rows(x: Tensor, context: ForwardContext | None, is_expert: bool = False) -> Tensor:
    """Return a tensor [tokens, I] as [rows, length, I] if the context says how many rows there are; any other tensor as it is.

    OPT flattens batch and length before its MLP: with 2 rows, [6, I] becomes [2, 3, I], and padding-free it becomes [1, 6, I].
    is_expert: whether x is the input of one expert in a list, which gets only the tokens that were chosen for it.
    Raises `GraftError` for such an input if rows have different adapters.
    """
    if context is None or x.dim() != 2 or not x.is_floating_point():
        return x
    if is_expert and isinstance(context.rows, tuple):
        raise GraftError(
            f"a list of experts passes {len(x)} tokens to this layer, and their rows are not known: with adapters in experts, give all "
            "rows of a batch one adapter, or choose sites outside the experts"
        )
    if context.flat or is_expert:
        return x.unsqueeze(0) if context.flat else x
    count = (
        len(context.rows)
        if isinstance(context.rows, tuple)
        else len(context.lengths)
        if context.lengths is not None
        else 0
    )
    return x.view(count, -1, x.shape[-1]) if count and x.shape[0] % count == 0 else x

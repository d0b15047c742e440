"""Rows of a tensor by adapter: taken apart, and put together again.

Rows that lie together are taken by one split of each tensor, whose gradient is one concatenation. A view of each piece by itself would cost
a tensor of zeros of the whole size, and a sum of it, per piece in backward.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from graft.errors import GraftError
from graft.routing.context import ForwardContext, Index


class RowSplit:
    """Disjoint pieces of tensors along one dimension; slices come in ascending order."""

    def __init__(self, indices: Sequence[Index], size: int, dim: int) -> None:
        self.indices, self.size, self.dim = indices, size, dim
        self._sizes: list[int] | None = None
        """Of all runs of rows, those that no index names too; None where rows do not lie together."""
        self._places: list[int] = []
        """Of each index, its run."""
        if all(isinstance(index, slice) for index in indices):
            self._sizes = self._runs()
        self._split: list[tuple[Tensor, Sequence[Tensor]]] = []

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
        """A piece of x."""
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
        """x with these pieces in place of its own; slices are joined by one copy."""
        if self._sizes is None:
            return scatter(x, self.dim, self.indices, pieces)
        runs = list(self._pieces(x))
        for place, piece in zip(self._places, pieces, strict=True):
            runs[place] = piece
        return runs[0] if len(runs) == 1 else torch.cat(runs, self.dim)


def gather(x: Tensor, index: Index, dim: int) -> Tensor:
    """A piece of x along a dimension."""
    if isinstance(index, slice):
        return x.narrow(dim, index.start, index.stop - index.start)
    return x.index_select(dim, index.to(x.device))


def scatter(x: Tensor, dim: int, indices: Sequence[Index], pieces: Sequence[Tensor]) -> Tensor:
    """x with other pieces at these indices, in any order."""
    for index, piece in zip(indices, pieces, strict=True):
        at = torch.arange(index.start, index.stop, device=x.device) if isinstance(index, slice) else index.to(x.device)
        x = x.index_copy(dim, at, piece)
    return x


def by_rows(x: Tensor, context: ForwardContext | None, is_expert: bool = False) -> Tensor:
    """[tokens, I] as [rows, length, I] where the pass knows its rows (OPT flattens batch and length before its MLP).

    `in_list`: x is the input of one of several modules side by side, which as experts see the tokens alone that were chosen for them.
    """
    if context is None or x.dim() != 2 or not x.is_floating_point():
        return x
    if is_expert and isinstance(context.rows, tuple):
        raise GraftError(
            f"a list of experts hands this layer {len(x)} tokens that do not say whose they are: with adapters there, give all rows of a "
            "batch one adapter, or choose sites outside the experts"
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

"""The rows of a pass that adapters of one stack serve, as products over all of them read them.

The adapters of a stack have equal shapes, and their factors lie one after another in one tensor, each in its own slot. A block is what one
batched product takes: adapters with about equally many tokens, since those with fewer are padded to the most.

Example: adapters a, b and c in the slots 4, 5 and 6 have 3, 2 and 3 tokens, one after the other. One block has the slots 4 to 6, the
width 3 and the places [0 1 2, 3 4, 6 7 8] of 9: the last place of b stays zero. With 3 tokens each there are no places: the tokens are
seen as [3, 3] where they are.

Legend: J adapters, N tokens of the adapter that has most, M tokens of all, D features.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from graft.routing.context import AdapterContext, ForwardContext

Slots = Mapping[str, tuple[Any, int]]
"""Adapter -> its stack, and its slot there."""
_Member = tuple[str, slice, AdapterContext]
"""An adapter of a pass, its rows and its context."""


@dataclass(frozen=True, eq=False)
class Block:
    """Adapters of one stack that share a batched product."""

    names: frozenset[str]
    slots: slice | Tensor
    """Their slots, in the order of their tokens."""
    contexts: tuple[tuple[slice, AdapterContext], ...]
    """The rows of each, and its context."""
    counts: tuple[int, ...]
    """Tokens of each."""
    span: slice | None
    """The tokens of all, where they follow one another."""
    tokens_M: Tensor | None
    """The tokens of all, where they do not."""
    places_M: Tensor | None
    """Where each token stands in [J, N]; None if all have N."""

    @property
    def width(self) -> int:
        """N."""
        return max(self.counts)

    def rows(self, x_TD: Tensor) -> Tensor:
        """Return the tokens [M, D] of a tensor of all tokens: a view where they follow one another."""
        return x_TD[self.span] if self.span is not None else x_TD.index_select(0, self._tokens)

    def padded(self, rows_MD: Tensor) -> Tensor:
        """Lay the tokens out as [J, N, D], with zeros behind those of an adapter that has fewer."""
        if self.places_M is None:
            return rows_MD.view(len(self.counts), -1, rows_MD.shape[-1])
        wide = rows_MD.new_zeros(len(self.counts) * self.width, rows_MD.shape[-1])
        return wide.index_copy_(0, self.places_M, rows_MD).view(len(self.counts), -1, rows_MD.shape[-1])

    def unpadded(self, wide_JND: Tensor) -> Tensor:
        """Return the tokens [M, D] of what `padded` laid out."""
        flat = wide_JND.reshape(-1, wide_JND.shape[-1])
        return flat if self.places_M is None else flat.index_select(0, self.places_M)

    def put(self, x_TD: Tensor, rows_MD: Tensor, overwrite: bool = False) -> None:
        """Add tokens to those of a tensor of all tokens, or write them over it."""
        if self.span is not None:
            own = x_TD[self.span]
            own.copy_(rows_MD) if overwrite else own.add_(rows_MD)
        elif overwrite:
            x_TD.index_copy_(0, self._tokens, rows_MD)
        else:
            x_TD.index_add_(0, self._tokens, rows_MD)

    @property
    def _tokens(self) -> Tensor:
        assert self.tokens_M is not None
        return self.tokens_M


def blocks_of(context: ForwardContext, x: Tensor, slots: Slots) -> list[tuple[Any, Block]]:
    """Return (stack, block) for the rows of a batch x, [B, L, D] or padding-free [1, T, D]; made once for all modules of a pass.

    Left out are adapters whose rows are not neighbours, and those with which no other has about as many tokens.
    """
    key = ("blocks", x.shape[0], x.shape[1], x.device.index or 0)
    kept: dict[Any, Any] = context._groups
    if key not in kept:
        with torch.inference_mode(False):
            kept[key] = _blocks(context, x, slots)
    return kept[key]


def _blocks(context: ForwardContext, x: Tensor, slots: Slots) -> list[tuple[Any, Block]]:
    length = 1 if context.flat else x.shape[1]
    members: dict[Any, list[_Member]] = {}
    groups = context.groups(x)
    times = Counter(name for name, _, _ in groups)
    for name, index, ctx in groups:
        if name in slots and times[name] == 1 and isinstance(index, slice):
            members.setdefault(slots[name][0], []).append((name, index, ctx))
    parts = [(stack, part) for stack, own in members.items() for part in _alike(own)]
    return [(stack, _block(part, slots, length, x.device)) for stack, part in parts if len(part) > 1]


def _alike(members: list[_Member]) -> list[list[_Member]]:
    """Cut the members of a stack into those that are padded together: all, if that less than doubles the work, else by powers of two."""
    counts = [index.stop - index.start for _, index, _ in members]
    if max(counts) * len(counts) < 2 * sum(counts):
        return [members]
    found: dict[int, list[_Member]] = {}
    for member, count in zip(members, counts, strict=True):
        found.setdefault((count - 1).bit_length(), []).append(member)
    return list(found.values())


def _block(own: list[_Member], slots: Slots, length: int, device: torch.device) -> Block:
    numbers = np.array([slots[name][1] for name, _, _ in own])
    starts = np.array([index.start for _, index, _ in own]) * length
    ends = np.array([index.stop for _, index, _ in own]) * length
    counts = ends - starts
    follow, level = bool((ends[:-1] == starts[1:]).all()), bool((counts == counts[0]).all())
    before = counts.cumsum() - counts  # tokens of the adapters before
    within = np.arange(counts.sum()) - np.repeat(before, counts)  # number of each token among its adapter's
    places = within + np.repeat(np.arange(len(own)) * counts.max(), counts)
    tokens = within + np.repeat(starts, counts)

    def tensor(values: np.ndarray) -> Tensor:
        return torch.from_numpy(values).to(device)

    return Block(
        frozenset(name for name, _, _ in own),
        slice(int(numbers[0]), int(numbers[-1]) + 1) if bool((np.diff(numbers) == 1).all()) else tensor(numbers),
        tuple((index, ctx) for _, index, ctx in own),
        tuple(counts.tolist()),
        slice(int(starts[0]), int(ends[-1])) if follow else None,
        None if follow else tensor(tokens),
        None if level else tensor(places),
    )

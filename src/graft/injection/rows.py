"""Let each adapter change its own rows of a tensor: by the forward context in eager code, by slot numbers in compiled code.

Both classes apply a `step` (what one adapter does to its rows) through the same methods, so the container need not know which one it has.

Legend: B rows, L length, T tokens of a padding-free batch, D features.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from graft.injection.state import State
from graft.routing.context import AdapterContext, ForwardContext
from graft.routing.rows import RowSplit

Gather = Callable[[Tensor], Tensor]
"""Return, of a tensor of all rows, those of the adapter that acts."""
Step = Callable[..., Tensor]
"""step(adapter, h, ctx, gather=...) -> h: what one adapter does to its own rows."""
NO_NAMES: frozenset[str] = frozenset()


def whole(x: Tensor) -> Tensor:
    """Return x: the adapter that acts has all rows."""
    return x


class RowGroups:
    """Eager code: each adapter in use computes on its own rows, and other attached adapters cost nothing.

    Example: rows ("a", None, "b", "a") give the groups a: [0, 3] and b: slice(2, 3). Row 1 stays the base's.
    """

    def __init__(self, context: ForwardContext) -> None:
        self.context = context

    def names(self, table: Mapping[str, Any]) -> list[str]:
        """Return the adapters of a table that serve a row."""
        return [name for name in self.context.names if name in table]

    def apply(
        self, h: Tensor, table: Mapping[str, Sequence[Any]], step: Step, skip: frozenset[str] = NO_NAMES
    ) -> Tensor:
        """Let each adapter of a table change its rows of h. skip: adapters that have changed theirs already."""
        context = self.context
        if isinstance(context.rows, str):
            if context.rows not in skip:
                for adapter in table.get(context.rows, ()):
                    h = step(adapter, h, context.everything)
            return h
        if not any(name in table and name not in skip for name in context.names):
            return h
        found = [group for group in context.groups(h) if table.get(group[0]) and group[0] not in skip]
        dim = 1 if context.flat else 0
        split, pieces = RowSplit([index for _, index, _ in found], h.shape[dim], dim), []
        for number, (name, _, ctx) in enumerate(found):
            piece = split.gather(h, number)
            for adapter in table[name]:
                piece = step(adapter, piece, ctx, gather=functools.partial(split.gather, number=number))
            pieces.append(piece)
        return split.scatter(h, pieces)


class SlotSelection:
    """Compiled code: every attached adapter computes on all rows, and a slot number per row selects the result.

    Switching and routing then change a tensor of numbers, never the graph. With slots a: 0 and b: 1, the rows ("a", None, "b") are the
    numbers [0, -1, 1]: `torch.where` takes row 0 from a, row 2 from b, and leaves row 1 as the base made it.
    """

    context = None

    def __init__(self, state: State) -> None:
        self.state = state

    def names(self, table: Mapping[str, Any]) -> list[str]:
        """Return all adapters of a table, because a graph does not depend on the context."""
        return list(table)

    def apply(
        self, h: Tensor, table: Mapping[str, Sequence[Any]], step: Step, skip: frozenset[str] = NO_NAMES
    ) -> Tensor:
        """Let each adapter of a table compute on all rows, and keep the result in its own."""
        if not table:
            return h
        slot_B = self.state.slots_of_rows(h.shape[0], h.device)
        for name, adapters in table.items():
            if not self.state.in_memory(name):
                continue
            chosen = (slot_B == self.state.served(name).slot).view((-1,) + (1,) * (h.dim() - 1))
            for adapter in adapters:
                h = torch.where(chosen, step(adapter, h, AdapterContext()), h)
        return h


Rows = RowGroups | SlotSelection

"""The order in which the adapters of one layer are folded into its weight."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from graft.adapters.base import Adapter


def fold_steps(parts: Sequence[tuple[Adapter, Any]]) -> Iterator[tuple[Any, Any]]:
    """Yield (how to fold, where) for the adapters of one layer, in the order that gives what they compute.

    E.g. a and b compute b.adapt(x', a.adapt(x', base(x'))) with x' = b.before(a.before(x)). So fold a and b, then the input of b, then a's.
    """
    yield from ((adapter.fold, where) for adapter, where in parts)
    yield from ((adapter.fold_input, where) for adapter, where in reversed(parts))

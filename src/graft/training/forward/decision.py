"""What the proofs of a run's layout have found (`layout.py` makes them)."""

from __future__ import annotations

from dataclasses import dataclass

from graft.data.batches import Layout


@dataclass(frozen=True)
class Decision:
    """The layout and, where a model that was to run flat runs padded, the reason."""

    layout: Layout
    difference: float | None = None
    """Mean absolute difference of the token losses between the layouts."""
    reason: str | None = None

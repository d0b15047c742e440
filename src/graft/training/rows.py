"""One row of a step: a sequence that runs through the base under one adapter.

A row is plain data, made by `Job.rows_of`. Code that needs the row's job looks it up by name.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import numpy as np

from graft.data.samples import Example

View = Literal["adapter", "reference", "again"]
"""What a row runs through: the job's adapter, the frozen reference that its objective compares with, or the adapter a second time, with
other draws (dropout, routes)."""


@dataclass(frozen=True, eq=False)
class Row:
    """One sequence of a job's step. Rows are compared by identity, since an example holds arrays.

    A supervised sample is one row. A pair of answers is two rows, or four where the objective compares with a reference:

        part 0, adapter      part 1, adapter      part 0, reference      part 1, reference

    A sample whose objective compares two passes is two rows, of the views adapter and again.
    """

    job: str
    """Name of the job."""
    adapter: str | None
    """Name of the adapter that the sequence runs through; None is the bare base."""
    example: Example
    sample: int
    """Index of the sample in the job's data."""
    position: int
    """Index of the sample in the job's step."""
    part: int
    """0 for the chosen answer of a pair and for everything that is not a pair, 1 for the rejected answer or a mismatched sequence."""
    view: View
    seed: int
    """Dropout seed of this sequence: the same in any layout, in any micro-batch and next to any other jobs."""
    pass_seed: int
    """Seed of what all rows of a view draw together in a step: dropout of virtual tokens, the route of a mixture."""

    smoothing: float = 0.0
    """Share of each target that is spread over the vocabulary, or over all classes."""

    share: float = 0.0
    """Its share in a loss that the adapter adds as a mean over the rows of a step."""

    whole: bool = False
    """Whether it has to be in one pass with all rows of its job's step, because a loss compares them."""

    @cached_property
    def tokens(self) -> int:
        """Tokens that run, padding not counted."""
        return len(self.example)

    @cached_property
    def targets(self) -> int:
        """Targets that have a loss."""
        return self.example.num_targets

    @property
    def where(self) -> str:
        """File and row of the sample, for messages."""
        return f"{self.example.source}:{self.example.row}"


def row_seed(*key: int) -> int:
    """Return the seed of a row's dropout, or of what the rows of a pass share (63 bits): a hash of these numbers."""
    return int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0] >> np.uint64(1))


def by_job(rows: Sequence[Row]) -> dict[str, list[int]]:
    """Return the places of each job's rows, jobs in the order in which they first occur."""
    places: dict[str, list[int]] = {}
    for at, row in enumerate(rows):
        places.setdefault(row.job, []).append(at)
    return places


def units(rows: Sequence[Row]) -> list[list[Row]]:
    """Return the rows that stay together, in the order in which they first occur: those of a sample, or of a job's whole step."""
    found: dict[tuple[str, int], list[Row]] = {}
    for row in rows:
        found.setdefault((row.job, -1 if row.whole else row.position), []).append(row)
    return list(found.values())

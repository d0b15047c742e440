"""One row of a step."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from graft.data.samples import Example

if TYPE_CHECKING:
    from graft.training.job import Job


@dataclass(frozen=True, eq=False)
class Row:
    """One sequence of a job's step: a sample, or one side of a pair, whose four sequences (two without a reference) are four rows."""

    job: Job
    example: Example
    sample: int
    """Its number in the job's data."""
    position: int
    """Its place in the job's step: with job seed and step number, what its dropout is seeded by."""
    part: int = 0
    """Of a pair 0 for the chosen answer and 1 for the rejected one, whose dropout has seeds of its own."""
    frozen: bool = False
    """Whether it runs through the job's reference in place of its adapter."""

    @property
    def adapter(self) -> str | None:
        """Who serves this sequence; None is the bare base."""
        return self.job.reference if self.frozen else self.job.name

    @property
    def seed(self) -> int:
        """The same in any layout, micro-batch and company."""
        return self.job.seed_of(self.position, self.part)

    @property
    def where(self) -> str:
        """The row of the data, for people."""
        return f"{self.example.source}:{self.example.row}"

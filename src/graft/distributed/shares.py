"""Who runs what: the rows of a step are dealt to the ranks, and a job may have a home, the only rank on which it lives.

Every rank knows the rows of the whole step, so each can say who runs which without a message.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from graft.distributed.group import ALONE, Group

Mode = Literal["single", "spread", "ddp", "fsdp2", "pipeline"]


@dataclass(frozen=True)
class Shares:
    """How the work of a run is dealt to its ranks."""

    group: Group = ALONE
    mode: Mode = "single"
    homes: dict[str, int] = field(default_factory=dict)
    """Job -> the rank on which it lives; a job that is not here lives on all ranks."""

    @property
    def in_passes(self) -> bool:
        """Whether ranks exchange in the middle of a pass, so that one that leaves it leaves the others waiting."""
        return self.mode in ("fsdp2", "pipeline")

    @property
    def takes_jobs(self) -> bool:
        """Whether jobs may join while the run trains: their adapters are made on a whole base."""
        return self.mode != "pipeline"

    @property
    def ahead(self) -> int:
        """How many passes begin on this rank before the first of them goes backward. The last stage of a pipeline turns at once."""
        return self.group.size - self.group.rank if self.mode == "pipeline" else 1

    @property
    def sees_losses(self) -> bool:
        """Whether the losses that a pass returns on this rank are those of its rows: only the last stage of a pipeline has them."""
        return self.mode != "pipeline" or self.group.rank == self.group.size - 1

    def here(self, job: str) -> bool:
        """Whether a job lives on this rank."""
        return self.homes.get(job, self.group.rank) == self.group.rank

    def writes(self, job: str) -> bool:
        """Whether this rank writes the files of a job."""
        return self.homes.get(job, 0) == self.group.rank

    def settle(self, jobs: Sequence[tuple[str, float]]) -> None:
        """Give each of these jobs a home where jobs have homes: the heaviest first, to the rank that carries least. jobs: name, weight."""
        if self.mode != "spread":
            return
        counts = [sum(home == rank for home in self.homes.values()) for rank in range(self.group.size)]
        for rank, own in enumerate(lightest_first([weight for _, weight in jobs], self.group.size, counts)):
            self.homes.update((jobs[at][0], rank) for at in own)

    def deal(self, units: Sequence[tuple[str, int]]) -> list[list[int]]:
        """For each rank, the numbers of the units that it runs, in their order. units: the job and the tokens of each.

        For example, units of 9, 7, 5 and 4 tokens on two ranks: [9, 4] and [7, 5].
        """
        shares: list[list[int]] = [[] for _ in range(self.group.size)]
        free: list[int] = []
        loads = [0.0] * self.group.size
        for at, (job, tokens) in enumerate(units):
            if job in self.homes:
                shares[self.homes[job]].append(at)
                loads[self.homes[job]] += tokens
            else:
                free.append(at)
        for rank, own in enumerate(lightest_first([units[at][1] for at in free], self.group.size, loads)):
            shares[rank] += [free[at] for at in own]
        return [sorted(own) for own in shares]


def lightest_first(weights: Sequence[float], size: int, loads: Sequence[float]) -> list[list[int]]:
    """Deal numbers to ranks: the heaviest first, each to the rank that carries least by then. loads: what they carry already."""
    carried, shares = list(loads), [[] for _ in range(size)]
    for at in sorted(range(len(weights)), key=lambda at: -weights[at]):
        rank = min(range(size), key=carried.__getitem__)
        shares[rank].append(at)
        carried[rank] += weights[at]
    return shares

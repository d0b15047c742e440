"""The jobs of a run: which are there, which are in memory, which take the next step, and which failed.

Decisions depend on the jobs, on the commands carried out and, where memory is limited, on measured peaks. All of this is in checkpoints.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from typing import Any

import torch

from graft.config.scheduling import SchedulerConfig
from graft.runs.folder import RunFolder
from graft.training.batching import Batcher
from graft.training.job import Job
from graft.training.offload import offload, reload
from graft.training.rows import Row
from graft.training.scheduling.admission import admit, in_order, window
from graft.training.scheduling.halving import Halving
from graft.training.scheduling.median import Median
from graft.training.scheduling.memory import Load, MemoryModel, memory_limit


class JobPool:
    """The jobs of a run in the order in which they joined.

    `failed` holds the last record of jobs that failed, by name; their adapters are detached. `batcher` says how rows become batches; it
    has the run's present layout.
    """

    def __init__(self, jobs: Sequence[Job], config: SchedulerConfig, batcher: Batcher) -> None:
        self.jobs, self.config, self.batcher = list(jobs), config, batcher
        for arrival, job in enumerate(self.jobs):
            job.arrival = arrival
        self.failed: dict[str, dict[str, Any]] = {}
        self.halving, self.median = Halving(config.halving), Median(config.median)
        self.memory = MemoryModel()
        self.limit: int | None = None
        self._fullest: dict[tuple[str, str], Load] = {}

    def __contains__(self, name: str) -> bool:
        return name in self.failed or any(job.name == name for job in self.jobs)

    def find(self, name: str) -> Job | None:
        """Find a job by name; None where there is none, or where it failed."""
        return next((job for job in self.jobs if job.name == name), None)

    @property
    def live(self) -> list[Job]:
        """The jobs that still take steps."""
        return [job for job in self.jobs if job.ended is None]

    @property
    def resident(self) -> list[Job]:
        """The jobs in memory."""
        return [job for job in self.jobs if job.resident]

    def add(self, job: Job) -> None:
        """Add a job that joins while others train."""
        job.arrival = 1 + max((each.arrival for each in self.jobs), default=-1)
        self.jobs.append(job)

    def end_worst(self) -> list[Job]:
        """End the jobs that lose at their rung, or that are above the median at a validation; returns them."""
        return [*self.halving.decide(self.jobs), *self.median.decide(self.jobs)]

    def note_loss(self, job: Job, loss: float) -> None:
        """Note a validation loss for the comparisons that may end jobs. One that is not finite is the worst of all."""
        known = loss if math.isfinite(loss) else sys.float_info.max
        self.median.note(job, known)
        if self.halving.at_rung(job):
            self.halving.note(job, known)

    def measure(self, device: torch.device) -> bool:
        """Set the limit of memory for this device, the smallest of all ranks; whether there is one. Jobs with homes have none."""
        own = None if self.batcher.shares.homes else memory_limit(device, self.config.memory)
        self.limit = None if own is None else -int(self.batcher.shares.group.most(-own))
        return self.limit is not None

    def rebalance(self, folder: RunFolder) -> bool:
        """Bring the jobs that are admitted into memory and offload the others; whether any job moved."""
        waiting = sorted(in_order(self.live), key=self.halving.holds)  # jobs that wait at a rung come last
        admitted = admit(waiting, self.config.resident, self._fits)
        leaving = [job for job in self.resident if job not in admitted]
        coming = [job for job in admitted if not job.resident]
        shares = self.batcher.shares
        with shares.group.agreed():
            for job in leaving:
                offload(folder, job, shares.writes(job.name))
        with shares.group.agreed():
            for job in coming:
                reload(folder, job)
        return bool(leaving or coming)

    def next(self) -> list[Job]:
        """The jobs in memory that take the next step, in the order in which they joined."""
        ready = [job for job in in_order(self.resident) if job.ended is None and not self.halving.holds(job)]
        chosen = window(ready, self.config.together, lambda job: max(row.tokens for row in job.rows()))
        return sorted(chosen, key=lambda job: job.arrival)

    def load(self, rows: Sequence[Row]) -> Load:
        """The load of these rows as one micro-batch."""
        return Load.of([row.tokens for row in rows], self.batcher.layout == "padded")

    def load_of_next_step(self, jobs: Sequence[Job]) -> Load:
        """The load of the fullest micro-batch in the next step of these jobs."""
        shares = self.batcher.dealt([row for job in jobs for row in job.rows()])
        loads = [self.load(micro) for own in shares if own for micro in self.batcher.cut(own)]
        return max(loads, key=lambda load: (load.tokens, load.squares))

    def observe(self, load: Load, num_bytes: int | None) -> None:
        """Note the measured peak memory of a step, the largest of all ranks; None where the system cannot measure it."""
        most = int(self.batcher.shares.group.most(-1 if num_bytes is None else num_bytes))
        if most >= 0:
            self.memory.observe(load, most - sum(job.own_bytes for job in self.resident))

    def too_large(self) -> str | None:
        """A warning about jobs that need more memory than the limit even alone, or None. They run nevertheless, one at a time."""
        needs = {job.name: self._predicted([job], margin=False) or 0.0 for job in self.live}
        most = max(needs, key=lambda name: needs[name], default=None)
        if self.limit is None or most is None or needs[most] <= self.limit:
            return None
        others = sum(need > self.limit for need in needs.values()) - 1
        return (
            f"A step of '{most}' alone takes about {needs[most] / 1e9:.2f} GB, above the {self.limit / 1e9:.2f} GB that this run may use"
            + (f", and so do those of {others} more" if others else "")
            + ": such a job runs by itself. Set scheduler.memory higher, or train.token_budget lower"
        )

    def _fits(self, jobs: Sequence[Job]) -> bool:
        """Whether these jobs fit into memory together. A margin is kept only where one has to be brought in, so that jobs do not swap back
        and forth."""
        if self.limit is None:
            return True
        predicted = self._predicted(jobs, margin=any(not job.resident for job in jobs))
        return predicted is not None and predicted <= self.limit

    def _predicted(self, jobs: Sequence[Job], margin: bool) -> float | None:
        """Predicted peak bytes of the fullest step of these jobs; None before any step was measured."""
        load = Load.together([self._fullest_of(job) for job in jobs], self.batcher.budget)
        return self.memory.predict(load, sum(job.own_bytes for job in jobs), margin)

    def _fullest_of(self, job: Job) -> Load:
        """The load of the job's fullest micro-batch, computed once per layout."""
        key = (job.name, self.batcher.layout)
        if key not in self._fullest:
            self._fullest[key] = self.load(self.batcher.longest(job))
        return self._fullest[key]

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps of the pool, besides the jobs themselves."""
        own = {"halving": self.halving.state(), "median": self.median.state(), "memory": self.memory.seen}
        return {"gone": self.failed, **own}

    def restore(self, state: dict[str, Any]) -> None:
        """Continue where a checkpoint was made."""
        self.failed = state["gone"]
        self.halving = Halving(self.config.halving, state["halving"])
        self.median = Median(self.config.median, state.get("median"))
        self.memory = MemoryModel([tuple(each) for each in state["memory"]])

"""The median rule (Golovin et al. 2017): a job ends at a validation where its loss is above the median of all jobs at the same step.

Jobs are judged once every job that takes the same step has been validated, so their order changes nothing. Losses of earlier runs, which
the configuration gives, count like those of other jobs.

For example, a, b and c have losses 2.0, 1.0 and 3.0 at step 100, and an earlier run had 1.5: the median is 1.75, so a and c end.
"""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median
from typing import Any

from graft.config.scheduling import MedianConfig
from graft.training.job import Job

BELOW = "median"


class Median:
    """The losses at each step as {step: {job: loss}}, and what was judged already. state: as in `Halving`."""

    def __init__(self, config: MedianConfig | None, state: dict[str, Any] | None = None) -> None:
        self.config = config
        self.losses: dict[str, dict[str, float]] = state["losses"] if state else {}
        self.judged: dict[str, list[str]] = state["judged"] if state else {}

    def state(self) -> dict[str, Any]:
        """Return the record as JSON values."""
        return {"losses": self.losses, "judged": self.judged}

    def note(self, job: Job, loss: float) -> None:
        """Note a job's validation loss."""
        if self.config is not None:
            self.losses.setdefault(str(job.step), {})[job.name] = loss

    def decide(self, jobs: Sequence[Job]) -> list[Job]:
        """End the jobs that are above the median at the step where they were just validated; returns them."""
        ended: list[Job] = []
        if self.config is None:
            return ended
        for job in jobs:
            step = str(job.step)
            here, judged = self.losses.get(step, {}), self.judged.setdefault(step, [])
            if job.ended is not None or job.name not in here or job.name in judged or job.step < self.config.after:
                continue
            judged.append(job.name)
            known = [*here.values(), *self.config.history.get(step, [])]
            if len(known) >= self.config.least and here[job.name] > median(known):
                job.ended = BELOW
                ended.append(job)
        return ended

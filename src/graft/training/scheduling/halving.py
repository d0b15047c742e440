"""Successive halving (Jamieson and Talwalkar 2016): at each rung, jobs are compared and the best share goes on.

Jobs with the same validation data are compared with each other. A job that has reached a rung waits there until no other is on its way to
it. Then the best of all that ever reached the rung go on: the share `keep`, rounded up. The others that wait there end. A job that comes
later is compared with the losses on record.

For example, `keep` is 0.5, and a, b and c reach the rung of step 100 with losses 2.0, 1.0 and 3.0. Half of three, rounded up, is two: b
and a go on, and c ends.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from graft.config.scheduling import HalvingConfig
from graft.training.job import Job

HALVED = "halved"


class Halving:
    """The record of the rungs: losses as {rung: {validation data: {job: loss}}}, and the jobs that passed each rung.

    state: what the method `state` returned, in a run that is resumed.
    """

    def __init__(self, config: HalvingConfig | None, state: dict[str, Any] | None = None) -> None:
        self.config = config
        self.losses: dict[str, dict[str, dict[str, float]]] = state["losses"] if state else {}
        self.passed: dict[str, list[str]] = state["passed"] if state else {}

    def state(self) -> dict[str, Any]:
        """Return the record as JSON values."""
        return {"losses": self.losses, "passed": self.passed}

    def idle(self, jobs: Sequence[Job]) -> str | None:
        """A note where halving has no effect, since no job reaches the first rung; else None."""
        if self.config is None or any(rung < job.steps for rung in self.config.rungs for job in jobs):
            return None
        longest = max((job.steps for job in jobs), default=0)
        return f"scheduler.halving has no effect: its first rung is step {self.config.rungs[0]}, the longest job has {longest} steps"

    def at_rung(self, job: Job) -> bool:
        """Whether a job is at a rung before its last step: then it is validated and compared."""
        return self.config is not None and job.step in self.config.rungs and job.step < job.steps

    def note(self, job: Job, loss: float) -> None:
        """Note a job's validation loss at its rung."""
        self.losses.setdefault(str(job.step), {}).setdefault(_group(job), {})[job.name] = loss

    def holds(self, job: Job) -> bool:
        """Whether a job waits at its rung."""
        return self.at_rung(job) and job.name not in self.passed.get(str(job.step), [])

    def decide(self, jobs: Sequence[Job]) -> list[Job]:
        """Let the best jobs pass each rung that no other job is on its way to, and end the others there; returns the ended jobs."""
        ended: list[Job] = []
        if self.config is None:
            return ended
        for rung in self.config.rungs:
            waiting = [job for job in jobs if job.ended is None and job.step == rung and self.holds(job)]
            for group in sorted({_group(job) for job in waiting}):
                rivals = [job for job in jobs if _group(job) == group and job.ended is None and rung < job.steps]
                if any(job.step < rung for job in rivals):
                    continue
                losses = self.losses[str(rung)][group]
                best = sorted(losses, key=lambda name: losses[name])[: math.ceil(self.config.keep * len(losses))]
                for job in (each for each in waiting if _group(each) == group):
                    self.passed.setdefault(str(rung), []).append(job.name)
                    if job.name not in best:
                        job.ended = HALVED
                        ended.append(job)
        return ended


def _group(job: Job) -> str:
    """The validation data, which jobs that are compared have in common."""
    return job.validation.digest if job.validation is not None else ""

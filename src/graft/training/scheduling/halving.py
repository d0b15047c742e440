"""Successive halving (Jamieson and Talwalkar 2016): at each rung, jobs are compared and the best share goes on.

Compared are jobs with the same validation data. A job that has reached a rung waits there until no other is on its way to it; then the
share `keep` of all that ever reached the rung, rounded up, goes on, and of those that wait the rest ends. A job that comes later is
measured against the losses that are on record.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from graft.config.scheduling import HalvingConfig
from graft.training.job import Job

HALVED = "halved"


class Halving:
    """The record of the rungs. `state` is JSON: {rung: {validation data: {job: loss}}}, and who has passed."""

    def __init__(self, config: HalvingConfig | None, state: dict[str, Any] | None = None) -> None:
        self.config = config
        self.losses: dict[str, dict[str, dict[str, float]]] = state["losses"] if state else {}
        self.passed: dict[str, list[str]] = state["passed"] if state else {}

    def state(self) -> dict[str, Any]:
        """As JSON values."""
        return {"losses": self.losses, "passed": self.passed}

    def idle(self, jobs: Sequence[Job]) -> str | None:
        """What to tell where no job is long enough to be halved."""
        if self.config is None or any(rung < job.steps for rung in self.config.rungs for job in jobs):
            return None
        longest = max((job.steps for job in jobs), default=0)
        return f"scheduler.halving has no effect: its first rung is step {self.config.rungs[0]}, the longest job has {longest} steps"

    def at_rung(self, job: Job) -> bool:
        """Whether a job stands at a rung below its end: then it is validated and compared."""
        return self.config is not None and job.step in self.config.rungs and job.step < job.steps

    def note(self, job: Job, loss: float) -> None:
        """A job's validation loss at its rung."""
        self.losses.setdefault(str(job.step), {}).setdefault(_group(job), {})[job.name] = loss

    def holds(self, job: Job) -> bool:
        """Whether a job waits at its rung."""
        return self.at_rung(job) and job.name not in self.passed.get(str(job.step), [])

    def decide(self, jobs: Sequence[Job]) -> list[Job]:
        """Let jobs pass where none is on the way any more, and end those that do worst; returns these."""
        ended: list[Job] = []
        if self.config is None:
            return ended
        for rung in self.config.rungs:
            waiting = [job for job in jobs if job.ended is None and job.step == rung and self.holds(job)]
            for group in sorted({_group(job) for job in waiting}):
                own = [job for job in jobs if _group(job) == group and job.ended is None and rung < job.steps]
                if any(job.step < rung for job in own):
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
    return job.validation.digest if job.validation is not None else ""

"""Record what happens in a run: metrics, events and status in the run folder, numbers to trackers, lines to the terminal."""

from __future__ import annotations

import time
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from typing import Any

import torch

from graft.errors import GraftError
from graft.runs.folder import RunFolder
from graft.training.forward.kernels import Acceleration
from graft.training.job import Job
from graft.training.job_pool import JobPool
from graft.training.records.progress import Reporter, memory_bytes
from graft.training.records.trackers import Tracker
from graft.training.step import Outcome
from graft.training.validation import in_words
from graft.utils.clock import Clock, describe_times, timed

STATUS_SECONDS = 5.0


class Recorder:
    """Records what happens in one run."""

    def __init__(
        self, folder: RunFolder, pool: JobPool, reporter: Reporter, trackers: Sequence[Tracker], log_every: int
    ) -> None:
        self.folder, self.pool, self.reporter = folder, pool, reporter
        self.trackers, self.log_every = list(trackers), log_every
        self.losses: dict[str, float] = {}
        self.acceleration = Acceleration()
        self.clock = Clock()
        self._tokens, self._seconds, self._peak, self._status_at = 0, 0.0, 0, 0.0

    def close(self) -> None:
        """Close the terminal's line and the trackers at the end of the run."""
        self.reporter.close()
        for tracker in self.trackers:
            tracker.close()

    @timed("books")
    def log(self, step: int, outcomes: Mapping[str, Outcome], seconds: float, device: torch.device) -> None:
        """Record a step: a line of metrics per job, and the line in the terminal. seconds: wall time of the step."""
        tokens = sum(outcome.tokens for outcome in outcomes.values())
        self._tokens, self._seconds = self._tokens + tokens, self._seconds + seconds
        self._peak = max(self._peak, memory_bytes(device))
        shared = {"tokens_per_second": tokens / seconds, "seconds": seconds, "memory_bytes": self._peak}
        shown: dict[str, Any] = {}
        lines: list[dict[str, Any]] = []
        for job in (each for each in self.pool.jobs if each.name in outcomes):
            metrics = {"epoch": round(job.epochs_done, 4), **outcomes[job.name].metrics, **shared}
            self.losses[job.name] = metrics["loss"]
            if job.step == 1 or job.ended or step % self.log_every == 0:
                lines.append({"step": step, "job": job.name, "job_step": job.step, **metrics})
                self._track(step, job, metrics)
            shown = shown or metrics
        if lines:  # one write for all jobs
            self.folder.metrics.append(*lines)
        if len(self.pool.jobs) > 1:
            shown = {**shown, "losses": {name: outcome.loss for name, outcome in outcomes.items()}}
        self.reporter.step(sum(job.step for job in self.pool.jobs), shown)

    @timed("books")
    def record(self, step: int, job: Job, metrics: Mapping[str, Any]) -> None:
        """Write one line of metrics.jsonl, and the same to the trackers. `step` is the run's; the line also has the job's own."""
        self.folder.metrics.append({"step": step, "job": job.name, "job_step": job.step, **metrics})
        self._track(step, job, metrics)

    def _track(self, step: int, job: Job, metrics: Mapping[str, Any]) -> None:
        prefix = f"{job.name}/" if len(self.pool.jobs) > 1 else ""
        for tracker in self.trackers:
            tracker.log(step, {prefix + name: number for name, number in metrics.items()})

    @timed("books")
    def event(self, kind: str, **facts: Any) -> None:
        """Write one line of events.jsonl."""
        self.folder.events.append({"time": datetime.now(UTC).isoformat(), "event": kind, **facts})

    @timed("books")
    def say(self, text: str) -> None:
        """Print a sentence in the terminal."""
        self.reporter.say(text)

    def kernels(self, found: Acceleration, step: int) -> None:
        """Note the kernels that compute from now on, or why none do; say so where it changed."""
        before, self.acceleration = self.acceleration, found
        if (found.kernels, found.reason) == (before.kernels, before.reason):
            return
        self.event("kernels", step=step, **asdict(found))
        self.say(
            f"Kernels: {found.kernels}" if found.reason is None else f"Liger's kernels cannot be used: {found.reason}"
        )

    def at(self, step: int) -> str:
        """Name a step of the run, as apart from those of its jobs where there are several."""
        return f"run step {step}" if len(self.pool.jobs) + len(self.pool.failed) > 1 else f"step {step}"

    def validated(self, step: int, job: Job, scores: Mapping[str, float], best: bool) -> None:
        """Record a job's validation."""
        self.record(step, job, {"epoch": round(job.epochs_done, 4), **scores})
        self.say(f"{self.at(step)}  {job.name}: {in_words(scores)}{'  (best)' if best else ''}")

    def job_failed(self, step: int, job: str, error: Exception, **facts: Any) -> str:
        """Record that a job failed: an event with the error and, where it is not the user's mistake, its trace. Returns its message."""
        said = str(error) or type(error).__name__
        if not isinstance(error, GraftError):
            facts["trace"] = "".join(traceback.format_exception(error))
        self.event("job_failed", job=job, step=step, error=said, **facts)
        self.say(f"{self.at(step)}  {job} failed and is taken out; the others go on: {said}")
        return said

    @timed("books")
    def status(self, step: int, state: str = "running", **facts: Any) -> None:
        """Write status.json, every few seconds while the run trains and at its end."""
        if state == "running" and time.monotonic() - self._status_at < STATUS_SECONDS:
            return
        self._status_at = time.monotonic()
        jobs = {job.name: self.standing(job) for job in self.pool.jobs} | self.pool.failed
        speed = self._tokens / self._seconds if self._seconds else None
        self.folder.status(
            {
                "state": state,
                "step": step,
                "layout": self.pool.batcher.layout,
                "kernels": self.acceleration.kernels,
                "tokens_per_second": speed,
                "time": self.clock.read(),
                "jobs": jobs,
                **facts,
            }
        )

    def ended(self, step: int, state: str) -> None:
        """Record that the run finished, was stopped or failed."""
        self.status(step, state)
        self.event(state, step=step)
        if step:
            self.say(f"Time: {describe_times(self.clock.read())}")

    def standing(self, job: Job) -> dict[str, Any]:
        """Return where a job stands, as status.json has it."""
        where = "running" if job.resident else "preempted" if job.step else "waiting"
        return {
            "state": job.ended or where,
            "step": job.step,
            "steps": job.steps,
            "loss": self.losses.get(job.name),
            "best": job.best,
            "ended": job.ended,
            "priority": job.priority,
        }

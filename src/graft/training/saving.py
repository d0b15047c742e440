"""What a run keeps on disk of its jobs while it trains: checkpoints when they are due, and the adapter folder of each job that ends."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Sequence
from typing import Any

from graft.distributed.shares import Shares
from graft.runs.commands import CommandQueue
from graft.runs.folder import RunFolder
from graft.training.checkpoints import (
    offload_dir,
    restore_checkpoint,
    restore_trained,
    save_checkpoint,
    verify_checkpoint,
)
from graft.training.job import FAILED, Job
from graft.training.job_pool import JobPool
from graft.training.offload import offload, reload
from graft.training.passes import check_equal
from graft.training.records.recorder import Recorder

SAVE_SECONDS = 600.0
"""Longest time between checkpoints where no number of steps is set."""


class Saver:
    """Saves the jobs of one run.

    `publish(job)` writes the adapter folder (or the model) that users take: after a job's first step, and at its end.
    """

    def __init__(
        self, folder: RunFolder, pool: JobPool, queue: CommandQueue, recorder: Recorder,
        publish: Callable[[Job], Any], every: int | None, keep: int,
    ) -> None:  # fmt: skip
        self.folder, self.pool, self.queue, self.recorder = folder, pool, queue, recorder
        self.publish, self.every, self.keep = publish, every, keep
        self._published: set[str] = set()
        """Jobs that ended and have their final adapter folder."""
        self._saved, self._saved_at = -1, time.monotonic()

    @property
    def shares(self) -> Shares:
        """Who writes which job."""
        return self.pool.batcher.shares

    def save_if_due(self, step: int, stepped: Sequence[Job], validated: bool, best: bool) -> None:
        """Save after a step where it is due: by number of steps or by time, for a best validation, and at a job's first and last step.

        stepped: the jobs that took the step. validated, best: whether any of them was validated, and whether one did best so far.
        """
        first = [job for job in stepped if job.step == 1]
        late = validated or self.shares.group.any(time.monotonic() - self._saved_at > SAVE_SECONDS)[0]
        due = step % self.every == 0 if self.every else late
        if first or due or best or any(job.ended for job in stepped):
            self.save(step)
        if first:  # a disk that fails, or an adapter that cannot be saved, shows now and not at the end
            with self.shares.group.agreed():
                own = [job for job in first if self.shares.writes(job.name)]
                verify_checkpoint(self.folder.checkpoint_dir(step), own)
                for job in own:
                    self.publish(job)

    def save(self, step: int) -> None:
        """Write the checkpoint of a step, once."""
        if self._saved == step:
            return
        more = {**self.pool.state(), "orders": self.queue.done, "losses": self.recorder.losses}
        layout = self.pool.batcher.layout
        check_equal(self.shares, self.pool.jobs)
        save_checkpoint(self.folder, self.pool.jobs, step, layout, self.keep, self.shares, **more)
        self._saved, self._saved_at = step, time.monotonic()
        self.recorder.event("checkpoint", step=step)

    def restore(self, step: int) -> dict[str, Any]:
        """Put model, jobs, pool, queue and losses where a checkpoint has them; its state.json."""
        state = restore_checkpoint(self.folder, self.pool.jobs, step)
        self.pool.restore(state)
        self.queue.skip(state["orders"])
        self.recorder.losses.update(state["losses"])
        self._saved = step
        return state

    def publish_ended(self) -> None:
        """Publish the jobs that ended since the last call, and free their memory."""
        for job in self.pool.jobs:
            if job.ended is not None and job.ended != FAILED and job.name not in self._published:
                self.publish_best(job)
                with self.shares.group.agreed():
                    offload(self.folder, job, self.shares.writes(job.name))

    def publish_best(self, job: Job) -> None:
        """Publish a job's adapter as it was at its best validation, or as it is where the job has none."""
        with self.shares.group.agreed():
            if not job.resident:
                reload(self.folder, job)
            if job.step and job.here:
                if job.best is not None and job.best_at is not None and job.best["step"] != job.step:
                    restore_trained(self.folder, job, job.best_at)
                if self.shares.writes(job.name):
                    self.publish(job)
        if job.ended is not None:
            self._published.add(job.name)
            job.best_at = None  # its best weights are now the ones that it has, so no checkpoint is kept for them

    def close(self, step: int) -> None:
        """Save the last step and publish every job that is not yet. What was offloaded is in the checkpoint, so it goes."""
        if step:
            self.save(step)
        for job in self.pool.jobs:
            if job.name not in self._published:
                self.publish_best(job)
        self.shares.group.wait()
        if self.shares.group.leads:
            shutil.rmtree(offload_dir(self.folder), ignore_errors=True)

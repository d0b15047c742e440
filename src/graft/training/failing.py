"""Jobs that fail while others go on: noted at once, taken out of the model when the session ends."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from graft.attaching.attach import detach
from graft.distributed.failures import mistaken
from graft.runs.folder import RunFolder
from graft.training.job import FAILED, Job
from graft.training.job_pool import JobPool
from graft.training.records.failed_batch import save_failed_batch
from graft.training.records.recorder import Recorder
from graft.training.saving import Saver
from graft.training.step import NonFinite


class Failing:
    """The jobs of one run that failed. `leaving`: those whose adapters are still attached."""

    def __init__(self, model: nn.Module, folder: RunFolder, pool: JobPool, recorder: Recorder, saver: Saver) -> None:
        self.model, self.folder, self.pool, self.recorder, self.saver = model, folder, pool, recorder, saver
        self.leaving: list[Job] = []

    def note(self, job: Job, error: Exception, step: int) -> None:
        """Note that a job failed. The only job of a run raises its error, which ends the run."""
        if len(self.pool.jobs) == 1 and not self.pool.failed:
            raise error
        facts: dict[str, Any] = {}
        if isinstance(error, NonFinite) and self.pool.batcher.shares.group.leads:
            facts["batch"] = str(save_failed_batch(self.folder, error, f"failed_batch-{job.name}"))
        said = self.recorder.job_failed(step, job.name, error, **facts)
        job.ended = FAILED
        self.leaving.append(job)
        facts |= {"error": said, "mistake": mistaken(error)}
        self.pool.failed[job.name] = {**self.recorder.standing(job), **facts}

    def detach(self) -> None:
        """Detach the adapters of jobs that failed. What they had learnt before is published if it is finite."""
        for job in self.leaving:
            finite = all(bool(torch.isfinite(parameter).all()) for parameter in job.params.values())
            if not self.pool.batcher.shares.group.any(not finite)[0]:
                self.saver.publish_best(job)
            for name in filter(None, (job.trainable.adapter, job.reference)):
                detach(self.model, name)
            self.pool.jobs.remove(job)
        self.leaving = []

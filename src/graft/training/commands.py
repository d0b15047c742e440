"""Carry out the commands that users give a run, between its steps: submit a job, cancel one, set its priority.

A job that cannot join is noted as failed, with the reason; the other jobs go on.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from graft.attaching.attach import detach
from graft.attaching.parameters import names
from graft.config.jobs import REFERENCE
from graft.distributed.failures import RankLost, mistaken
from graft.errors import counted
from graft.runs.commands import Command, CommandQueue
from graft.training.forward.layout import decide
from graft.training.forward.tasks import forward_of
from graft.training.job import FAILED, Job
from graft.training.job_pool import JobPool
from graft.training.records.recorder import Recorder

BuildJob = Callable[[str, Mapping[str, Any]], Job]
"""Makes a job from its name and its own settings, with its adapter attached."""


class Commands:
    """Takes the commands of one run from its queue and changes the job pool."""

    def __init__(
        self, model: nn.Module, queue: CommandQueue, pool: JobPool, recorder: Recorder, build_job: BuildJob | None, layout: str
    ) -> None:  # fmt: skip
        self.model, self.queue, self.pool, self.recorder = model, queue, pool, recorder
        self.build_job, self.layout = build_job, layout

    def handle(self, step: int) -> None:
        """Carry out the commands that are due after this many steps."""
        group = self.pool.batcher.shares.group
        taken: list[Command] = []
        with group.agreed():
            if group.leads:
                taken = self.queue.take(step)
        for command in group.tell(taken):
            job = self.pool.find(command["job"])
            if command["do"] == "unknown":
                self._ignore(command, command["reason"])
            elif command["do"] == "submit":
                self._submit(command, step)
            elif job is None or job.ended is not None:
                self._ignore(command, f"there is no job '{command['job']}' that still trains")
            elif command["do"] == "cancel":
                job.ended = "cancelled"
                self.recorder.event("cancelled", job=job.name, step=step)
                self.recorder.say(f"{self.recorder.at(step)}  {job.name} is cancelled")
            else:
                job.priority = command["priority"]
                self.recorder.event("priority", job=job.name, step=step, priority=job.priority)
                self.recorder.say(f"{self.recorder.at(step)}  {job.name} has priority {job.priority}")

    def _ignore(self, command: Command, reason: str) -> None:
        self.recorder.event("ignored", order=command, reason=reason)
        self.recorder.say(f"'{command['do']} {command['job']}' is ignored: {reason}")

    def _submit(self, command: Command, step: int) -> None:
        """Build the job and add it to the pool; on any error detach what was attached and note the job as failed."""
        name, build_job = command["job"], self.build_job
        if name in self.pool or build_job is None:
            self._ignore(command, f"there is a job '{name}' already" if build_job else "this run takes no new jobs")
            return
        try:
            with self.pool.batcher.shares.group.agreed():
                job = build_job(name, command["config"])
                if job.here:  # a demanded layout has to hold for it
                    decide(forward_of(self.model), [job], self.layout, self.pool.batcher)
        except RankLost:
            raise
        except Exception as error:
            for each in {name, f"{name}{REFERENCE}"} & set(names(self.model)):
                detach(self.model, each)
            said = self.recorder.job_failed(step, name, error)
            self.pool.failed[name] = {
                "state": FAILED, "step": 0, "steps": 0, "loss": None, "best": None, "ended": FAILED,
                "priority": int(command["config"].get("priority", 0)), "error": said, "mistake": mistaken(error),
            }  # fmt: skip
            return
        self.pool.add(job)
        self.recorder.reporter.total += job.steps
        self.recorder.event("submitted", job=name, step=step, steps=job.steps)
        self.recorder.say(f"{self.recorder.at(step)}  {name} joins with {counted(job.steps, 'step')}")

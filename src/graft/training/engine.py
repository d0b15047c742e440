"""The loop of a run: who trains, steps of those jobs, validation, checkpoints, and an orderly end whatever happens.

Between steps the run obeys its orders and lets go of jobs that failed. Adapters are attached and detached outside the modes of training, so
the loop is a row of sessions, each with the same adapters from beginning to end.
"""

from __future__ import annotations

import math
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import asdict
from typing import Any, Literal

import torch
from torch import nn

from graft.attaching.active import set_trainable
from graft.attaching.attach import detach
from graft.data.batches import Layout
from graft.errors import GraftError
from graft.runs.commands import CommandQueue
from graft.runs.folder import RunFolder
from graft.training.checkpoints import restore_adapter, restore_checkpoint, save_checkpoint, verify_checkpoint
from graft.training.commands import BuildJob, Commands
from graft.training.dry_run import calibrate, try_fullest
from graft.training.forward.compiled import compile_forward
from graft.training.forward.kernels import accelerating
from graft.training.forward.layout import decide, laid_out
from graft.training.forward.modes import recomputing, set_training
from graft.training.forward.tasks import forward_of
from graft.training.interrupt import Interrupt
from graft.training.isolation import joint_step
from graft.training.job import FAILED, Job
from graft.training.job_pool import JobPool
from graft.training.offload import offload, reload
from graft.training.records.failed_batch import save_failed_batch
from graft.training.records.progress import Reporter
from graft.training.records.recorder import Recorder
from graft.training.records.trackers import Tracker
from graft.training.scheduling.memory import Peak, measuring
from graft.training.settings import Settings
from graft.training.step import NonFinite
from graft.training.validation import validation_scores
from graft.utils.clock import timed

State = Literal["finished", "stopped", "failed"]
SAVE_SECONDS = 600.0
"""Longest time between checkpoints where no number of steps is set."""


class Engine:
    """Trains the jobs of a run. `publish(job)` writes an adapter folder for users: called once early, and when the job ends.
    `recruit` makes a job that is submitted while the run trains."""

    def __init__(
        self, model: nn.Module, jobs: Sequence[Job], folder: RunFolder, settings: Settings, reporter: Reporter,
        publish: Callable[[Job], Any], trackers: Sequence[Tracker] = (),
        build_job: BuildJob | None = None,
    ) -> None:  # fmt: skip
        self.model, self.folder, self.settings, self.reporter = model, folder, settings, reporter
        self.publish = publish
        self.pool = JobPool(jobs, settings.scheduler, settings.token_budget)
        self.recorder = Recorder(folder, self.pool, reporter, trackers, settings.log_every)
        self.queue = CommandQueue(folder.path)
        self.commands = Commands(
            model, self.queue, self.pool, self.recorder, build_job, settings.layout, settings.pad_id
        )
        self.forward = forward_of(model)
        self.step = 0
        self.layout: Layout = "padded"
        self._leaving: list[Job] = []
        self._settled: set[str] = set()
        self._saved, self._saved_at = -1, time.monotonic()

    @property
    def jobs(self) -> list[Job]:
        """The jobs that are there, ended ones too."""
        return self.pool.jobs

    @property
    def live(self) -> list[Job]:
        """The jobs that still take steps."""
        return self.pool.live

    def run(self, checkpoint: int | None = None) -> State:
        """Train to the end, from the start or from a checkpoint. A job that fails is taken out; the only job of a run raises
        its error, a `NonFinite` after saving the batch that did it."""
        wanted, interrupt = "padded" if self.settings.compile else self.settings.layout, Interrupt()
        if checkpoint is not None:
            wanted = self._restore(checkpoint)
        try:
            with interrupt.watching(), self.recorder.clock.running():
                begun = False
                self.commands.handle(self.step)
                while self.live and not interrupt.asked:
                    with ExitStack() as session:
                        self._prepare(session, wanted, begun, resumed=checkpoint is not None)
                        self._loop(interrupt)
                    begun, wanted = True, "padded" if self.layout == "padded" else self.settings.layout
                    self._depart()
                    self.commands.handle(self.step)
                return self._end()
        except NonFinite as error:
            self._fail(error, batch=str(save_failed_batch(self.folder, error)))
            raise
        except (Exception, KeyboardInterrupt) as error:
            self._fail(error)
            raise
        finally:
            self.recorder.close()

    def _restore(self, checkpoint: int) -> str:
        state = restore_checkpoint(self.folder, self.model, self.jobs, checkpoint)
        self.pool.restore(state)
        self.queue.skip(state["orders"])
        self.recorder.losses.update(state["losses"])
        self.reporter.first = sum(job.step for job in self.jobs)
        self.step = self._saved = checkpoint
        self.layout = state["layout"]
        return self.layout

    def _prepare(self, session: ExitStack, wanted: str, begun: bool, resumed: bool) -> None:
        """Prove head and layout, and put the model into the modes of training."""
        settings, here = self.settings, [job for job in self.live if job.resident]
        if here:
            self.forward = forward_of(self.model)
            decision = decide(self.forward, here, wanted, settings.pad_id)
            if decision.reason is not None:
                self.recorder.say(f"This model runs padded, not token-flat: {decision.reason}")
            self.layout = self.pool.layout = decision.layout
            if not begun:
                facts = {**asdict(decision), "head": self.forward.head_mode, "jobs": [job.name for job in here]}
                self.recorder.event("resume" if resumed else "start", **facts)
        session.enter_context(laid_out(self.model, self.layout))
        if settings.gradient_checkpointing:
            session.enter_context(recomputing(self.model, settings.base_dropout))
        self._set_modes()
        if here and settings.compile:
            self.recorder.say("Compiling the base: the next step may take minutes")
            compile_forward(self.forward, here, settings.compile, settings.pad_id)
        elif here:
            found = accelerating(self.forward, here, settings.kernels, self.layout, settings.pad_id)
            self.recorder.use(session.enter_context(found), self.step)
        if begun:
            return
        if self.forward.device.type == "cuda" and not resumed:
            try_fullest(self.forward, here, settings.token_budget, self.layout, settings.pad_id)
        if self.pool.measure(self.forward.device):
            if not self.pool.memory.seen:
                calibrate(self.forward, self.pool, settings.pad_id)
            if (said := self.pool.too_large()) is not None:
                self.recorder.say(said)
        if (said := self.pool.halving.idle(self.live)) is not None:
            self.recorder.say(said)
        self.recorder.status(self.step, self.layout)

    def _set_modes(self) -> None:
        names = [job.name for job in self.live if job.resident]
        set_trainable(self.model, names)
        set_training(self.model, names, self.settings.base_dropout)

    @timed("between")
    def _loop(self, interrupt: Interrupt) -> None:
        """Steps, until adapters have to come or go, nothing is left to do, or the user asks to stop."""
        while True:
            self._conclude()
            if interrupt.asked or self._leaving or not self.live or self.queue.due(self.step):
                return
            if self.pool.seat(self.folder, self.model):
                self._set_modes()
            self._take(self.pool.next())
            self.recorder.status(self.step, self.layout)

    def _take(self, jobs: Sequence[Job]) -> None:
        settings, started = self.settings, time.perf_counter()
        with measuring(self.forward.device) if self.pool.limit is not None else nullcontext(Peak()) as peak:
            load = self.pool.load_of(jobs) if self.pool.limit is not None else None
            outcomes, failures = joint_step(self.forward, jobs, settings.token_budget, self.layout, settings.pad_id)
        seconds = time.perf_counter() - started
        for job in (each for each in jobs if each.name in failures):
            self._lose(job, failures[job.name])
        if not outcomes:
            return
        if load is not None and not failures:
            self.pool.observe(load, peak.num_bytes)
        self.step += 1
        stepped = [job for job in jobs if job.name in outcomes]
        for job in stepped:
            job.last = self.step
        self.recorder.log(self.step, outcomes, seconds, self.forward.device)
        validated = [job for job in stepped if job.validation_due or self.pool.halving.at_rung(job)]
        best = [self._validate(job) for job in validated]
        self._save_if_due(stepped, bool(validated), any(best))

    def _validate(self, job: Job) -> bool:
        """Whether this was the job's best validation so far."""
        try:
            scores = validation_scores(self.forward, job, self.settings.token_budget, self.layout, self.settings.pad_id)
        except Exception as error:
            self._lose(job, error)
            return False
        loss = scores["validation_loss"]
        best = job.note_validation(loss)
        if best:
            job.best_at = self.step
        if self.pool.halving.at_rung(job):
            self.pool.halving.note(job, loss if math.isfinite(loss) else sys.float_info.max)
        self.recorder.validated(self.step, job, scores, best)
        if job.ended == "early":
            self.recorder.event("early_stop", job=job.name, step=self.step, best=job.best)
            self.recorder.say(f"{job.name}: no improvement in {job.stale} validations, stopped at step {self.step}")
        return best

    def _save_if_due(self, stepped: Sequence[Job], validated: bool, best: bool) -> None:
        every, fresh = self.settings.save_every, [job for job in stepped if job.step == 1]
        due = self.step % every == 0 if every else validated or time.monotonic() - self._saved_at > SAVE_SECONDS
        if fresh or due or best or any(job.ended for job in stepped):
            self._save()
        if fresh:
            verify_checkpoint(self.folder.checkpoint_dir(self.step), self.model, fresh)
            for job in fresh:
                self.publish(job)

    def _save(self) -> None:
        if self._saved != self.step:
            more = {**self.pool.state(), "orders": self.queue.done, "losses": self.recorder.losses}
            save_checkpoint(self.folder, self.model, self.jobs, self.step, self.layout, self.settings.keep, **more)
            self._saved, self._saved_at = self.step, time.monotonic()
            self.recorder.event("checkpoint", step=self.step)

    def _conclude(self) -> None:
        """End the jobs that lose at their rung; publish and set aside those that have ended."""
        for job in self.pool.halving.decide(self.jobs):
            self.recorder.event("halved", job=job.name, step=self.step, best=job.best)
            self.recorder.say(f"step {self.step}  {job.name}: ended at its rung, step {job.step}")
        for job in self.jobs if self.live else ():
            if job.ended is not None and job.ended != FAILED and job.name not in self._settled:
                self._settle(job)
                offload(self.folder, self.model, job)

    def _settle(self, job: Job) -> None:
        """Publish a job's adapter, at its best validation where there is one."""
        if not job.resident:
            reload(self.folder, self.model, job)
        if job.step:
            if job.best is not None and job.best_at is not None and job.best["step"] != job.step:
                restore_adapter(self.folder, self.model, job.name, job.best_at)
            self.publish(job)
        if job.ended is not None:
            self._settled.add(job.name)
            job.best_at = None  # its best weights are the ones it has

    def _lose(self, job: Job, error: Exception) -> None:
        """A job failed. It leaves when the session ends; the only job of a run takes the run with it."""
        if len(self.jobs) == 1 and not self.pool.failed:
            raise error
        facts = {}
        if isinstance(error, NonFinite):
            facts["batch"] = str(save_failed_batch(self.folder, error, f"failed_batch-{job.name}"))
        said = self.recorder.lost(self.step, job.name, error, **facts)
        job.ended = FAILED
        self._leaving.append(job)
        facts |= {"error": said, "mistake": isinstance(error, GraftError)}
        self.pool.failed[job.name] = {**self.recorder.standing(job), **facts}

    def _depart(self) -> None:
        """Detach the adapters of jobs that failed. What they had learnt by then is published, if it is sound."""
        for job in self._leaving:
            if all(bool(torch.isfinite(parameter).all()) for parameter in job.params.values()):
                self._settle(job)
            for name in filter(None, (job.name, job.reference)):
                detach(self.model, name)
            self.jobs.remove(job)
        self._leaving = []

    def _end(self) -> State:
        """Save what is there, publish the adapters, and say so."""
        state: State = "stopped" if self.live else "finished" if self.jobs else "failed"
        if self.step:
            self._save()
        for job in (each for each in self.jobs if each.name not in self._settled):
            self._settle(job)
        shutil.rmtree(self.folder.path / "aside", ignore_errors=True)  # all that lies there is in the checkpoint
        self.model.eval()
        self.recorder.ended(self.step, self.layout, state)
        if state == "stopped":
            self.recorder.say(f"Stopped at step {self.step}; all is saved. Go on with: graft resume {self.folder.path}")
        return state

    def _fail(self, error: BaseException, **facts: Any) -> None:
        said = str(error) or type(error).__name__
        self.recorder.event("failed", step=self.step, error=said, **facts)
        self.recorder.status(self.step, self.layout, "failed", error=said, **facts)

"""The loop of a run: steps of the jobs that are due, validation, checkpoints, and an orderly end whatever happens.

Between steps the run carries out its commands and lets go of jobs that failed. Adapters cannot come or go while the model is in the modes
of training. So the loop is a series of sessions: a session has the same adapters from beginning to end.

    run
      session                _prepare: prove head and layout, set modes, choose kernels
        step                 _step: joint step, validation, checkpoint
        step                 ...
      between sessions       failed jobs are detached, new jobs are attached
      session ...
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack, nullcontext, suppress
from dataclasses import asdict, replace
from typing import Any, Literal

from torch import nn

from graft.data.batches import Layout
from graft.distributed.failures import RankLost
from graft.distributed.shares import Shares
from graft.errors import GraftError
from graft.runs.commands import CommandQueue
from graft.runs.folder import RunFolder
from graft.training.banking import arrange, leave_stacks
from graft.training.batching import Batcher
from graft.training.commands import BuildJob, Commands
from graft.training.dry_run import check_memory
from graft.training.failing import Failing
from graft.training.forward.activations import holding
from graft.training.forward.anchors import prove_anchors
from graft.training.forward.compiled import compile_forward
from graft.training.forward.kernels import accelerating
from graft.training.forward.layout import agreed_layout, decide, laid_out
from graft.training.forward.packed import refuse_without_gradients
from graft.training.forward.tasks import forward_of
from graft.training.interrupt import Interrupt
from graft.training.isolation import joint_step
from graft.training.job import Job
from graft.training.job_pool import JobPool
from graft.training.out_of_memory import explained
from graft.training.records.failed_batch import save_failed_batch
from graft.training.records.progress import Reporter
from graft.training.records.recorder import Recorder
from graft.training.records.trackers import Tracker
from graft.training.saving import Saver
from graft.training.scheduling.halving import HALVED
from graft.training.scheduling.memory import Peak, measuring
from graft.training.settings import Settings
from graft.training.step import NonFinite
from graft.training.updates.rules import rule_of
from graft.training.validation import measured
from graft.utils.clock import timed

EndState = Literal["finished", "stopped", "failed"]


class Engine:
    """Trains the jobs of a run.

    publish: writes the adapter folder (or the model) of a job for users; called after the job's first step and when it ends.
    build_job: makes a job that is submitted while the run trains; without it the run takes no new jobs.
    answered: further scores of a job at a validation, from answers that it writes.
    """

    def __init__(
        self, model: nn.Module, jobs: Sequence[Job], folder: RunFolder, settings: Settings, reporter: Reporter,
        publish: Callable[[Job], Any], trackers: Sequence[Tracker] = (),
        build_job: BuildJob | None = None, answered: Callable[[Job], dict[str, float]] = lambda job: {},
        shares: Shares | None = None,
    ) -> None:  # fmt: skip
        self.model, self.folder, self.settings, self.reporter = model, folder, settings, reporter
        self.answered = answered
        self.shares = shares or Shares()
        self.group = self.shares.group
        batcher = Batcher(settings.token_budget, "padded", settings.pad_id, self.shares)
        self.pool = JobPool(jobs, settings.scheduler, batcher)
        self.recorder = Recorder(folder, self.pool, reporter, trackers, settings.log_every)
        self.queue = CommandQueue(folder.path)
        self.commands = Commands(model, self.queue, self.pool, self.recorder, build_job, settings.layout)
        self.saver = Saver(folder, self.pool, self.queue, self.recorder, publish, settings.save_every, settings.keep)
        self.forward = forward_of(model)
        self.step = 0
        self.failing = Failing(model, folder, self.pool, self.recorder, self.saver)

    @property
    def jobs(self) -> list[Job]:
        """The jobs that have an adapter, ended ones included."""
        return self.pool.jobs

    @property
    def live(self) -> list[Job]:
        """The jobs that still take steps."""
        return self.pool.live

    @property
    def layout(self) -> Layout:
        """The layout of the run's batches."""
        return self.pool.batcher.layout

    def run(self, checkpoint: int | None = None) -> EndState:
        """Train to the end, from the start or from a checkpoint. A job that fails leaves the run; the only job of a run raises its error.

        A `NonFinite` that is raised comes after its batch was saved.
        """
        wanted, interrupt = "padded" if self.settings.compile else self.settings.layout, Interrupt()
        if checkpoint is not None:
            wanted = self._restore(checkpoint)
        try:
            with interrupt.watching(), self.recorder.clock.running():
                begun = False
                self.commands.handle(self.step)
                while self.live and not self.group.any(interrupt.asked)[0]:
                    with ExitStack() as session:
                        self._prepare(session, wanted, begun, resumed=checkpoint is not None)
                        self._loop(interrupt)
                    # A run that went padded stays so; for a flat one the next session proves it again, for its own jobs.
                    begun, wanted = True, "padded" if self.layout == "padded" else self.settings.layout
                    self.failing.detach()
                    self.commands.handle(self.step)
                return self._end()
        except NonFinite as error:
            facts = {"batch": str(save_failed_batch(self.folder, error))} if self.group.leads else {}
            self._record_failure(error, **facts)
            if checkpoint is not None and self.step == checkpoint:
                diverged = GraftError(
                    f"the run in {self.folder.path} has diverged and cannot go on from step {checkpoint}: {error}. Train it again with "
                    "other settings (--overwrite, or in a new folder)"
                )
                diverged.quiet = error.quiet
                raise diverged from error
            raise
        except BaseException as error:
            self._record_failure(error)
            raise
        finally:
            self.recorder.close()

    def _restore(self, checkpoint: int) -> str:
        """Go on from a checkpoint; returns the layout that the run had."""
        with self.group.agreed():
            state = self.saver.restore(checkpoint)
        self.reporter.first = sum(job.step for job in self.jobs)
        self.step = checkpoint
        self._use_layout(state["layout"])
        return state["layout"]

    def _use_layout(self, layout: Layout) -> None:
        self.pool.batcher = replace(self.pool.batcher, layout=layout)

    def _prepare(self, session: ExitStack, wanted: str, begun: bool, resumed: bool) -> None:
        """Make the model ready for the steps of a session. `begun`: whether an earlier session of this process did the first checks."""
        settings, resident = self.settings, [job for job in self.live if job.resident and job.here]
        # Head and layout are proved on the bare model, before the modes of training.
        decision = None
        with self.group.agreed():
            if resident:
                self.forward = forward_of(self.model)
                if not begun and any(rule_of(job).backward for job in resident):
                    refuse_without_gradients(self.forward.root)
                decision = decide(self.forward, resident, wanted, self.pool.batcher)
        if (decision := agreed_layout(self.group, decision)) is not None:
            if decision.reason is not None:
                self.recorder.say(f"This model runs padded, not token-flat: {decision.reason}")
            self._use_layout(decision.layout)
            if not begun:
                facts = {**asdict(decision), "head": self.forward.head_mode, "jobs": [job.name for job in resident]}
                self.recorder.event("resume" if resumed else "start", **facts)
        session.enter_context(laid_out(self.model, self.layout))
        session.enter_context(holding(self.model, settings.activations, settings.base_dropout))
        self._set_modes()
        session.callback(leave_stacks, self.model)
        # The graph, or the kernels, come last: they are proved on the model as it trains.
        with self.group.agreed():
            if resident and settings.compile:
                self.recorder.say("Compiling the base: the next step may take minutes")
                compile_forward(self.forward, resident, settings.compile, self.pool.batcher)
            elif resident:
                kernels = accelerating(self.forward, resident, settings.kernels, self.pool.batcher)
                self.recorder.kernels(session.enter_context(kernels), self.step)
                prove_anchors(self.forward, resident, self.pool.batcher)
        if not begun:
            note = check_memory(self.forward, self.pool, resident, settings.activations, resumed)
            if note is not None:
                self.recorder.say(note)
            if (note := self.pool.halving.idle(self.live)) is not None:
                self.recorder.say(note)
            self.recorder.status(self.step)

    def _set_modes(self) -> None:
        """Gradients, training mode and places in memory for the adapters of the jobs that train now."""
        arrange(self.model, self.jobs, self.settings.base_dropout)

    @timed("between")
    def _loop(self, interrupt: Interrupt) -> None:
        """Take steps until adapters have to come or go, no job is left, or the user asks to stop."""
        while True:
            self._end_halved()
            if self.live:
                self.saver.publish_ended()
            stop = self.group.any(interrupt.asked, self.group.leads and self.queue.due(self.step))
            if any(stop) or self.failing.leaving or not self.live:
                return
            if self.pool.rebalance(self.folder):
                self._set_modes()
            self._step(self.pool.next())
            self.recorder.status(self.step)

    def _step(self, jobs: Sequence[Job]) -> None:
        """One step of these jobs, and what follows from it: metrics, validation, checkpoint."""
        self.group.step = self.step
        started, limited = time.perf_counter(), self.pool.limit is not None
        with measuring(self.forward.device) if limited else nullcontext(Peak()) as peak:
            load = self.pool.load_of_next_step(jobs) if limited else None
            outcomes, failures = joint_step(self.forward, jobs, self.pool.batcher)
        seconds = time.perf_counter() - started
        for job in jobs:
            if job.name in failures:
                error = explained(
                    failures.pop(job.name), self.forward, job, self.pool.batcher, self.settings.activations
                )
                self.failing.note(job, error, self.step)
        if not outcomes:
            return
        if load is not None and len(outcomes) == len(jobs):  # a step that was taken again has another peak
            self.pool.observe(load, peak.num_bytes)
        self.step += 1
        stepped = [job for job in jobs if job.name in outcomes]
        for job in stepped:
            job.last = self.step
        self.recorder.log(self.step, outcomes, seconds, self.forward.device)
        due = [job for job in stepped if job.validation_due or self.pool.halving.at_rung(job)]
        running = [(job, measured(self.forward, job, self.pool.batcher)) for job in due]
        self.saver.save_if_due(self.step, stepped, bool(due), any([self._validate(*each) for each in running]))

    def _validate(self, job: Job, scored: Callable[[], dict[str, float]]) -> bool:
        """Validate a job; whether this was its best validation so far."""
        try:
            scores = {**scored(), **self._answered(job)}
        except RankLost:
            raise
        except Exception as error:
            self.failing.note(job, error, self.step)
            return False
        loss = scores["validation_loss"]
        best = job.note_validation(loss)
        if best:
            job.best_at = self.step
        self.pool.note_loss(job, loss)
        self.recorder.validated(self.step, job, scores, best)
        if job.ended == "early":
            self.recorder.event("early_stop", job=job.name, step=self.step, best=job.best)
            self.recorder.say(
                f"{job.name}: no improvement in {job.stale} validations, stopped at {self.recorder.at(self.step)}"
            )
        return best

    def _answered(self, job: Job) -> dict[str, float]:
        """The scores of the answers that a job writes: by the rank that writes its files or, where the base is in parts, by all."""
        found: dict[str, float] = {}
        with self.group.agreed():
            if self.shares.mode == "fsdp2" or self.shares.writes(job.name):
                found = self.answered(job)
        return self.group.tell(found, self.shares.homes.get(job.name, 0))

    def _end_halved(self) -> None:
        """End the jobs that lose against the others."""
        for job in self.pool.end_worst():
            self.recorder.event(str(job.ended), job=job.name, step=self.step, best=job.best)
            rule = "at its rung" if job.ended == HALVED else "above the median"
            self.recorder.say(f"{self.recorder.at(self.step)}  {job.name}: ended {rule}, job step {job.step}")

    def _end(self) -> EndState:
        """Save and publish what is there, and say how the run ended."""
        state: EndState = "stopped" if self.live else "finished" if self.jobs else "failed"
        self.saver.close(self.step)
        self.model.eval()
        self.recorder.ended(self.step, state)
        if state == "stopped":
            self.recorder.say(
                f"Stopped at {self.recorder.at(self.step)}; everything is saved. Continue with: graft resume {self.folder.path}"
            )
        return state

    def _record_failure(self, error: BaseException, **facts: Any) -> None:
        """Note in events and status that the run failed. Where even that cannot be written, the error itself matters more."""
        said = str(error) or type(error).__name__
        with suppress(GraftError, OSError):
            self.recorder.event("failed", step=self.step, error=said, **facts)
            self.recorder.status(self.step, "failed", error=said, **facts)

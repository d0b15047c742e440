"""The rule `in_backward`: each parameter takes its update as soon as its gradient is there, and the gradient is freed.

A step is one pass, and its norm is known only afterwards, so nothing is clipped. The loss is checked before backward, when nothing has
changed. A gradient that is not finite ends the run with the parameters before it updated: the last checkpoint is whole.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.autograd.graph import increment_version

from graft.config.methods import FullMethod, QFTMethod
from graft.errors import GraftError, counted
from graft.training.batching import Batcher, num_tokens
from graft.training.forward.causal import Forward
from graft.training.job import Job
from graft.training.rows import Row
from graft.training.step import (
    Begun,
    Gradient,
    NonFinite,
    Outcome,
    Ran,
    backward,
    begin,
    finished,
    loss_of,
    refuse_missing,
    scores_of,
    sums_by_row,
)
from graft.training.updates.qft_lion import QFTLion
from graft.training.updates.rounding import Alone
from graft.training.updates.stack import refresh_if_due

Note = Callable[[nn.Parameter, Tensor], None]
"""Sees every gradient before the update that it makes."""


class InBackward:
    """Update in backward, for the only job of a run."""

    backward: ClassVar[bool] = True

    def passes(self, job: Job) -> int:
        """One."""
        return 1

    def prepare(self, forward: Forward, jobs: Sequence[Job], batcher: Batcher) -> dict[str, Gradient]:
        """Take the step: forward, and backward with the updates in it. A step that needs several micro-batches is an error."""
        (job,) = jobs
        begun = begin(forward, jobs, batcher)
        rows = begun.rows[job.name]
        ran, loss = _forward(forward, job, batcher, begun)
        scores = scores_of(job, begun, ran)  # refuses a loss that is not finite before anything has changed
        squares: dict[nn.Parameter, Tensor] = {}
        names = {id(each): name for name, each in job.params.items()}

        def note(parameter: nn.Parameter, grad: Tensor) -> None:
            square = grad.float().square().sum()
            if not bool(torch.isfinite(square)):
                raise NonFinite(job, f"gradient (of {names[id(parameter)]})", rows, rows)
            squares[parameter] = squares.get(parameter, torch.zeros_like(square)) + square

        with updating(job, note):
            backward([job], loss)
        if job.step == 1:
            refuse_missing(job, [name for name, each in job.params.items() if each not in squares])
        norm = float(torch.stack(list(squares.values())).sum().sqrt())
        return {job.name: Gradient(scores, norm, num_tokens(rows), begun.sizes[job.name].targets)}

    def discard(self, jobs: Sequence[Job], loss: Tensor) -> None:
        """Run backward, and drop each gradient where it would make an update."""
        (job,) = jobs
        with updating(job, None):
            backward([job], loss)

    def rehearse(self, forward: Forward, job: Job, batcher: Batcher) -> None:
        """Run the passes, and drop the gradients."""
        begun = begin(forward, [job], batcher)
        ran, loss = _forward(forward, job, batcher, begun)
        scores_of(job, begun, ran)
        self.discard([job], loss)

    def update(self, job: Job, gradient: Gradient) -> Outcome:
        """Move the job on: its parameters have changed already."""
        lr = float(job.optimizer.param_groups[0]["lr"])
        increment_version(job.params.values())
        outcome = finished(job, gradient, lr)
        if isinstance(job.optimizer, QFTLion):
            refresh_if_due(job)
        return outcome


def _forward(forward: Forward, job: Job, batcher: Batcher, begun: Begun) -> tuple[Ran, Tensor]:
    """Run the rows of a step, which have to be one micro-batch; what ran, and the loss."""
    if job.step == 0:
        _refuse_several(job, batcher, longest_step(job), "the longest step")
    micros = batcher.cut(begun.to_run)
    _refuse_several(job, batcher, begun.to_run, f"step {job.step + 1}")
    (micro,) = micros
    sums_R = sums_by_row(forward.losses(*batcher.inputs(micro, forward.device)), micro, [job])
    return Ran(micro, sums_R.detach().cpu()), loss_of([job], micro, sums_R, begun.sizes)


def longest_step(job: Job) -> list[Row]:
    """The rows of the longest step that a job can have."""
    size = min(job.config.batch_size, len(job.train))
    samples = sorted(range(len(job.train)), key=lambda index: -int(job.train.lengths[index]))[:size]
    return [row for at, sample in enumerate(samples) for row in job.rows_of(job.train[sample], sample, at)]


def _refuse_several(job: Job, batcher: Batcher, rows: Sequence[Row], what: str) -> None:
    count, method = len(batcher.cut(rows)), job.config.method
    if count > 1:
        assert isinstance(method, FullMethod | QFTMethod)
        raise GraftError(
            f"train.method {method.kind} with update: {method.update} takes a step in one pass, but {what} has "
            f"{counted(num_tokens(rows), 'token')}, which train.token_budget {batcher.budget} cuts into {count} micro-batches: raise "
            "train.token_budget, lower train.batch_size, or set update to after"
        )


@contextmanager
def updating(job: Job, note: Note | None) -> Iterator[None]:
    """Let backward update the job's parameters in a block of code. Without a `note` it drops the gradients instead."""
    optimizer = job.optimizer
    if isinstance(optimizer, QFTLion):
        optimizer.now, optimizer.factor = job.step, 1.0
        plain, take, rest = optimizer.plain_alone, optimizer.sinking, optimizer.step
    else:
        plain, take, rest = Alone(job), None, None

    def hook(parameter: Tensor) -> None:
        if parameter.grad is None:  # that of a weight in 8 bits goes another way
            return
        assert isinstance(parameter, nn.Parameter)
        if note is not None:
            note(parameter, parameter.grad)
            plain(parameter)
        parameter.grad = None

    handles = [each.register_post_accumulate_grad_hook(hook) for each in job.params.values()]
    try:
        if take is None:
            yield
        else:
            with take(note):
                yield
        if note is not None and rest is not None:
            rest()  # weights that several modules share
    finally:
        for handle in handles:
            handle.remove()
        optimizer.zero_grad(set_to_none=True)

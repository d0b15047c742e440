"""The rule `gradients`: forward and backward of every micro-batch, then the optimiser's step on what has come together.

prepare    accumulate, then finish; raises before any weight has changed
update     one job's optimiser and schedule
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from typing import ClassVar

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from graft.training.batching import Batcher, num_tokens
from graft.training.forward.causal import Forward
from graft.training.job import Job
from graft.training.passes import Passes, sum_gradients
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
from graft.training.updates.accumulation import Float32Sums
from graft.training.updates.bank import by_bank
from graft.training.updates.rounding import Alone, rounds_stochastically


class Gradients:
    """Backward, then update. A step that fails has changed nothing but gradients, so it can be taken again."""

    backward: ClassVar[bool] = True

    def passes(self, job: Job) -> int:
        """One."""
        return 1

    def prepare(self, forward: Forward, jobs: Sequence[Job], batcher: Batcher) -> dict[str, Gradient]:
        """Forward and backward of the next step of these jobs; a record of each job's gradient, by name."""
        _clear(jobs)
        begun = begin(forward, jobs, batcher)
        ran = _accumulate(forward, jobs, batcher, begun)
        banks = by_bank(jobs)
        norms = {job: norm for bank, own in banks.items() for job, norm in bank.norms(own).items()}
        found = {job.name: self._finish(job, begun, ran, norms.get(job)) for job in jobs}
        for bank, own in banks.items():
            bank.clip([job for job in own if job in norms], norms)
        return found

    def discard(self, jobs: Sequence[Job], loss: Tensor) -> None:
        """Run backward, and drop the gradients."""
        backward(jobs, loss)
        _clear(jobs)

    def rehearse(self, forward: Forward, job: Job, batcher: Batcher) -> None:
        """Make the gradients, and drop them."""
        self.prepare(forward, [job], batcher)
        _clear([job])

    def update(self, job: Job, gradient: Gradient) -> Outcome:
        """Take the job's optimiser step on the gradient that is in its parameters, unless its bank has taken it."""
        lr = float(job.optimizer.param_groups[0]["lr"])
        if job.bank is not None and job in job.bank.updated:
            pass
        elif rounds_stochastically(job):
            alone = Alone(job)
            for parameter in job.params.values():
                if parameter.grad is not None:
                    alone(parameter)
        else:
            job.optimizer.step()
            if job.bank is not None:
                job.bank.hold(job)
        # A fused step does not raise the versions of parameters, by which values kept from before it are known to be stale.
        increment_version(job.params.values())
        return finished(job, gradient, lr)

    def clip(self, job: Job, rows: Sequence[Row]) -> float:
        """Clip the job's gradient to `train.clip`, where that is set; returns the norm from before."""
        return _clip(job, rows)

    def _finish(self, job: Job, begun: Begun, ran: Ran, norm: float | None) -> Gradient:
        """Score the step of a job, refuse what is not finite, and clip where the job lives. norm: as its bank has it, which clips later."""
        rows, scores = begun.rows[job.name], scores_of(job, begun, ran)
        if norm is None or not math.isfinite(norm):
            norm = self.clip(job, rows) if job.here else math.nan
        return Gradient(scores, norm, num_tokens(rows), begun.sizes[job.name].targets)


def _clear(jobs: Sequence[Job]) -> None:
    """Drop the gradients of these jobs."""
    for bank, own in by_bank(jobs).items():
        bank.clear(own)
    for job in jobs:
        if job.bank is None:
            job.optimizer.zero_grad(set_to_none=True)


def _accumulate(forward: Forward, jobs: Sequence[Job], batcher: Batcher, begun: Begun) -> Ran:
    """Run all rows of the step, one micro-batch after the other, and add their gradients up in the parameters, over ranks too."""
    shares, passes = batcher.shares, Passes(batcher, begun.to_run)
    wide = [Float32Sums(job.params.values()) for job in jobs if job.config.accumulate_in == "float32"]
    added: dict[str, Counter[str]] = defaultdict(Counter)

    def loss(micro: list[Row]) -> Tensor:
        batch, context = batcher.inputs(micro, forward.device)
        losses_N = forward.losses(batch, context)
        for name, own in (context.losses or {}).items():
            added[name].update(own)  # pyright: ignore[reportArgumentType]
        sums_R = sums_by_row(losses_N, micro, jobs)
        passes.note(sums_R)
        return loss_of(jobs, micro, sums_R, begun.sizes) if shares.sees_losses else losses_N.sum()

    def differentiate(loss: Tensor) -> None:
        backward(jobs, loss)
        for each in wide:
            each.take()

    with passes.own():
        passes.both_ways(loss, differentiate)
        for micro in passes.spare:
            backward(jobs, forward.losses(*batcher.inputs(micro, forward.device)).sum() * 0.0)
        for each in wide:
            each.give()
        for job in jobs:
            # once per step: by the rank on which the job lives, or by the first
            penalty = job.penalty() if shares.writes(job.name) else None
            if penalty is not None:
                penalty.backward()
    for bank, own in by_bank(jobs).items():
        bank.collect(own)
    shared = [each for job in jobs if job.name not in shares.homes for each in job.params.values()]
    there = [each.grad is not None for each in shared] if shares.group.size > 1 else []
    rows, sums_R, counts = passes.exchange([len(added), *there])
    if there:
        sum_gradients(shares.group, shared, [count > 0 for count in counts[1:]])
    if counts[0] and shares.group.size > 1:
        floats = {name: {key: float(value) for key, value in own.items()} for name, own in added.items()}
        added = _merged(shares.group.gather(floats))
    return Ran([*begun.ran, *rows], torch.cat([begun.sums_R, sums_R]), added)  # pyright: ignore[reportArgumentType]


def _merged(each: Sequence[Mapping[str, Mapping[str, float]]]) -> dict[str, Counter[str]]:
    """The sums over ranks of the losses that adapters added."""
    found: dict[str, Counter[str]] = defaultdict(Counter)
    for own in each:
        for name, values in own.items():
            found[name].update(values)  # pyright: ignore[reportArgumentType]
    return found


def _clip(job: Job, rows: Sequence[Row]) -> float:
    # After a zero start the first gradient may be zero or missing; from the second step on every parameter must have one.
    if job.step == 1:
        refuse_missing(job, [name for name, parameter in job.params.items() if parameter.grad is None])
    given = {name: parameter for name, parameter in job.params.items() if parameter.grad is not None}
    total = torch.nn.utils.get_total_norm(
        [parameter.grad for parameter in given.values() if parameter.grad is not None]
    )
    norm = float(total)
    if not math.isfinite(norm):
        bad = next(name for name, parameter in given.items() if not bool(torch.isfinite(parameter.grad).all()))  # type: ignore[arg-type]
        raise NonFinite(job, f"gradient (of {bad})", rows, rows)
    if job.config.clip is not None:
        torch.nn.utils.clip_grads_with_norm_(given.values(), job.config.clip, total)
    return norm

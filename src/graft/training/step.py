"""One optimiser step of several jobs: their rows run together in micro-batches, and each job then takes its own update.

A job's loss is the sum over the supervised tokens of its whole step divided by their number, or what its objective makes of the pairs
of the whole step (`objectives.py`). It is the same however the step is cut into micro-batches. Jobs share nothing but the pass over
the base.

    make_gradients    accumulate, then finish; raises before any weight has changed
    accumulate        forward and backward of every micro-batch, and of the penalties
    finish            scores of each job; refuses what is not finite; clips
    update            one job's optimiser and schedule
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from graft.errors import GraftError, listed
from graft.training.batching import Batcher, num_tokens
from graft.training.forward.causal import Forward
from graft.training.job import Job
from graft.training.objectives import Marked, Scores, Size
from graft.training.rows import Row

NAMED = 8
"""Most samples that an error names."""


@dataclass(frozen=True)
class Outcome:
    """What a step of one job gave."""

    loss: float
    """Mean over the supervised tokens of the step, or what the objective makes of its pairs."""
    grad_norm: float
    """Norm of the gradient before clipping."""
    lr: float
    tokens: int
    """Tokens that ran, those of a reference included."""
    targets: int
    """Targets that the loss was taken over."""
    scores: Scores = field(default_factory=dict)
    """Further scores of the objective: those of pairs, by name."""

    @property
    def metrics(self) -> dict[str, float]:
        """All numbers by the names that they have in metrics.jsonl."""
        plain = {each.name: getattr(self, each.name) for each in fields(self) if each.name != "scores"}
        return {**plain, **self.scores}


class NonFinite(GraftError):
    """A loss or gradient is not a finite number.

    `rows` are the job's rows of the step; `suspects` are those with such a loss, or all where no single row is known.
    """

    def __init__(self, job: Job, what: str, rows: Sequence[Row], suspects: Sequence[Row]) -> None:
        self.job, self.what, self.rows, self.suspects = job, what, tuple(rows), tuple(suspects)
        places = list(dict.fromkeys(row.where for row in self.suspects))
        super().__init__(
            f"the {what} of '{job.name}' became infinite or not a number in step {job.step + 1}. "
            f"Samples: {listed(places, NAMED)}. "
            "Likely causes: a learning rate that is too high, a broken sample, or a base that overflows in this dtype"
        )


@dataclass(frozen=True)
class Accumulated:
    """What forward and backward of a step gave, besides the gradients themselves."""

    rows: dict[str, list[Row]]
    """Rows of each job, in the job's own order."""
    sizes: dict[str, Size]
    """What the sums of each job are divided by."""
    ran: list[Row]
    """All rows in the order in which they ran, [R]."""
    sums_R: Tensor
    """The summed target losses of each row that ran, on the CPU."""


@dataclass(frozen=True)
class Gradient:
    """What is known of one job's gradient once it is finite and clipped. The gradient itself is in the parameters."""

    scores: Scores
    """The loss and what else the objective tells of the step."""
    norm: float
    """Before clipping."""
    tokens: int
    targets: int


def make_gradients(forward: Forward, jobs: Sequence[Job], batcher: Batcher) -> dict[str, Gradient]:
    """Forward and backward of the next step of these jobs; a record of each job's gradient, by name.

    Changes nothing but gradients, so a step that fails can be taken again. Raises `NonFinite` for the first job with a loss or gradient
    that is not finite, and `GraftError` where parameters get no gradient.
    """
    return finish(jobs, accumulate(forward, jobs, batcher))


def accumulate(forward: Forward, jobs: Sequence[Job], batcher: Batcher) -> Accumulated:
    """Run all rows of the step, one micro-batch after the other, and add their gradients up in the parameters."""
    rows = {job.name: job.rows() for job in jobs}
    sizes = {job.name: job.objective.size(rows[job.name]) for job in jobs}
    for job in jobs:
        job.optimizer.zero_grad(set_to_none=True)
    ran, sums = _run_first(forward, jobs, batcher, rows, sizes)
    ahead = set(ran)
    for micro in batcher.cut([row for own in rows.values() for row in own if row not in ahead]):
        losses_N = forward.losses(*batcher.inputs(micro, forward.device))
        sums_R = sums_by_row(losses_N, micro)
        loss_of(jobs, micro, sums_R, sizes).backward()
        ran += micro
        sums.append(sums_R.detach())
    for penalty in (job.penalty() for job in jobs):
        if penalty is not None:
            penalty.backward()
    return Accumulated(rows, sizes, ran, torch.cat(sums).cpu())


def _run_first(
    forward: Forward, jobs: Sequence[Job], batcher: Batcher, rows: Mapping[str, list[Row]], sizes: dict[str, Size]
) -> tuple[list[Row], list[Tensor]]:
    """Run what objectives measure before the losses of a step, without gradients, and put it into `sizes`."""
    measuring = {job.name: job.objective for job in jobs if isinstance(job.objective, Marked)}
    first = [row for name, objective in measuring.items() for row in objective.first(rows[name])]
    ran: list[Row] = []
    sums: list[Tensor] = []
    with torch.no_grad():
        for micro in batcher.cut(first) if first else ():
            ran += micro
            sums.append(sums_by_row(forward.losses(*batcher.inputs(micro, forward.device)), micro))
    for name, objective in measuring.items():
        own = [at for at, row in enumerate(ran) if row.job == name]
        sizes[name] = objective.measured(sizes[name], [ran[at] for at in own], torch.cat(sums)[own])
    return ran, sums


def sums_by_row(losses_N: Tensor, rows: Sequence[Row]) -> Tensor:
    """Sum the losses of each row's targets: [R], in float64 where the device has it, since pairs are about differences of sums."""
    counts = torch.tensor([row.targets for row in rows], device=losses_N.device)
    exact = losses_N if losses_N.device.type == "mps" else losses_N.double()
    # unsafe: a check of the lengths would make the CPU wait for the device
    return torch.segment_reduce(exact, "sum", lengths=counts, unsafe=True)


def loss_of(jobs: Sequence[Job], rows: Sequence[Row], sums_R: Tensor, sizes: Mapping[str, Size]) -> Tensor:
    """What a micro-batch adds to the losses of its jobs, as one sum.

    Each job's share depends on its own adapter alone, so the gradient of the sum gives every adapter the gradient of its own loss.
    """
    names = list(dict.fromkeys(row.job for row in rows))
    objectives = {job.name: job.objective for job in jobs}
    total = sums_R.new_zeros(())
    for name in names:
        own = [at for at, row in enumerate(rows) if row.job == name]
        own_sums = sums_R if len(names) == 1 else sums_R[own]
        total = total + objectives[name].share([rows[at] for at in own], own_sums, sizes[name])
    return total


def finish(jobs: Sequence[Job], step: Accumulated) -> dict[str, Gradient]:
    """Score the step of each job, refuse what is not finite, and clip. Raises as `make_gradients` does."""
    gradients: dict[str, Gradient] = {}
    for job in jobs:
        rows = step.rows[job.name]
        own = [at for at, row in enumerate(step.ran) if row.job == job.name]
        scores = job.objective.scores([step.ran[at] for at in own], step.sums_R[own])
        if not math.isfinite(scores["loss"]):
            suspects = [step.ran[at] for at in own if not math.isfinite(float(step.sums_R[at]))]
            raise NonFinite(job, "loss", rows, suspects or rows)
        gradients[job.name] = Gradient(scores, _clip(job, rows), num_tokens(rows), step.sizes[job.name].targets)
    return gradients


def _clip(job: Job, rows: Sequence[Row]) -> float:
    """Clip the job's gradient to `train.clip`, where that is set; returns the norm from before."""
    # After a zero start the first gradient may be zero or missing; from the second step on every parameter must have one.
    if job.step == 1:
        _refuse_missing(job)
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


def _refuse_missing(job: Job) -> None:
    missing = [name for name, parameter in job.params.items() if parameter.grad is None]
    if missing:
        raise GraftError(
            f"{len(missing)} of {len(job.params)} parameters of '{job.name}' get no gradient, among them '{missing[0]}': "
            "the loss does not depend on them. Choose other sites"
        )


def update(job: Job, gradient: Gradient) -> Outcome:
    """Take the job's optimiser step on the gradient that is in its parameters."""
    lr = float(job.optimizer.param_groups[0]["lr"])
    job.optimizer.step()
    # A fused step does not raise the versions of parameters, by which values kept from before it are known to be stale.
    increment_version(job.params.values())
    job.schedule.step()
    job.advance()
    scores = dict(gradient.scores)
    return Outcome(scores.pop("loss"), gradient.norm, lr, gradient.tokens, gradient.targets, scores)

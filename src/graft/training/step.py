"""One optimiser step of all jobs: their rows together in micro-batches, each job's loss over its own supervised tokens, its own update.

The loss of a job is the sum over the supervised tokens of its whole step divided by their number, or what its objective makes of the pairs
of the whole step (objectives.py), however the step is cut into micro-batches. Jobs share nothing but the pass over the base.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from graft.data.batches import Layout
from graft.errors import GraftError
from graft.training.batching import context_of, cut, lay_out
from graft.training.forward.causal import Forward
from graft.training.job import Job
from graft.training.objectives import Scores, Size
from graft.training.rows import Row


@dataclass(frozen=True)
class Outcome:
    """What a step of one job gave."""

    loss: float
    """Mean over the supervised tokens of the step, or what the objective makes of its pairs."""
    grad_norm: float
    """Before clipping."""
    lr: float
    tokens: int
    """Tokens that ran, those of a reference too."""
    targets: int
    """Targets that the loss was taken over."""
    scores: Scores = field(default_factory=dict)
    """What else is told of the pairs of a step."""

    @property
    def metrics(self) -> dict[str, float]:
        """All of it by name, as metrics.jsonl has it."""
        plain = {each.name: getattr(self, each.name) for each in fields(self) if each.name != "scores"}
        return {**plain, **self.scores}


class NonFinite(GraftError):
    """A loss or gradient that is not a number. Carries the rows of the step, the losses of their tokens, and the suspects."""

    def __init__(self, job: Job, what: str, rows: Sequence[Row], suspects: Sequence[Row]) -> None:
        self.job, self.what, self.rows, self.suspects = job, what, tuple(rows), tuple(suspects)
        places = list(dict.fromkeys(row.where for row in self.suspects))
        shown = ", ".join(places[:8])
        more = f" and {len(places) - 8} more" if len(places) > 8 else ""
        super().__init__(
            f"the {what} of '{job.name}' became infinite or not a number in step {job.step + 1}. Samples: {shown}{more}. "
            "Likely causes: a learning rate that is too high, a broken sample, or a base whose weights do not bear this dtype"
        )


def sums_by_row(losses_N: Tensor, rows: Sequence[Row]) -> Tensor:
    """The losses of each row's targets summed, [R] in float64 (where the device has it): differences of sums are what pairs are about."""
    counts = torch.tensor([row.targets for row in rows], device=losses_N.device)
    exact = losses_N if losses_N.device.type == "mps" else losses_N.double()
    return torch.segment_reduce(
        exact, "sum", lengths=counts, unsafe=True
    )  # the check of its lengths would wait for the device


def loss_of(jobs: Sequence[Job], rows: Sequence[Row], sums_R: Tensor, sizes: Mapping[str, Size]) -> Tensor:
    """What a micro-batch adds to the losses of its jobs, in one sum."""
    names = list(dict.fromkeys(row.job for row in rows))
    objectives = {job.name: job.objective for job in jobs}
    total = sums_R.new_zeros(())
    for name in names:
        own = [at for at, row in enumerate(rows) if row.job == name]
        theirs = sums_R if len(names) == 1 else sums_R[own]
        total = total + objectives[name].share([rows[at] for at in own], theirs, sizes[name])
    return total


@dataclass(frozen=True)
class Gradients:
    """What the passes of a step left behind, besides the gradients themselves, which are finite and clipped."""

    rows: Sequence[Row]
    sizes: dict[str, Size]
    scores: dict[str, Scores]
    norms: dict[str, float]


def take_step(forward: Forward, jobs: Sequence[Job], budget: int, layout: Layout, pad_id: int) -> dict[str, Outcome]:
    """Forward and backward of all jobs' rows, then each job's update. Raises `NonFinite` before anything is changed."""
    gradients = make_gradients(forward, jobs, budget, layout, pad_id)
    return {job.name: update(job, gradients) for job in jobs}


def make_gradients(forward: Forward, jobs: Sequence[Job], budget: int, layout: Layout, pad_id: int) -> Gradients:
    """Forward and backward of all jobs' rows. Changes nothing but gradients. Raises `NonFinite` for the first job that has such."""
    rows = [row for job in jobs for row in job.rows()]
    sizes = {job.name: job.objective.size([row for row in rows if row.job == job.name]) for job in jobs}
    for job in jobs:
        job.optimizer.zero_grad(set_to_none=True)
    done: list[Row] = []
    sums: list[Tensor] = []
    for micro in cut(rows, budget, layout):
        losses_N = forward.losses(lay_out(micro, layout, pad_id).to(forward.device), context_of(micro, layout))
        sums_R = sums_by_row(losses_N, micro)
        loss_of(jobs, micro, sums_R, sizes).backward()
        done, sums = [*done, *micro], [*sums, sums_R.detach()]
    for penalty in (job.penalty() for job in jobs):
        if penalty is not None:
            penalty.backward()
    all_sums = torch.cat(sums).cpu()
    scores: dict[str, Scores] = {}
    norms: dict[str, float] = {}
    for job in jobs:
        own = [at for at, row in enumerate(done) if row.job == job.name]
        scores[job.name] = job.objective.scores([done[at] for at in own], all_sums[own])
        suspects = [done[at] for at in own if not math.isfinite(float(all_sums[at]))]
        norms[job.name] = _checked_norm(job, rows, scores[job.name]["loss"], suspects)
    return Gradients(rows, sizes, scores, norms)


def _checked_norm(job: Job, rows: Sequence[Row], loss: float, suspects: Sequence[Row]) -> float:
    """Clip the job's gradient; its norm before that."""
    own = [row for row in rows if row.job == job.name]
    if not math.isfinite(loss):
        raise NonFinite(job, "loss", own, suspects or own)
    if job.step == 1:  # behind a zero start the first gradient may be zero, the second is what training rests on
        _refuse_missing(job)
    given = {name: parameter for name, parameter in job.params.items() if parameter.grad is not None}
    total = torch.nn.utils.get_total_norm(
        [parameter.grad for parameter in given.values() if parameter.grad is not None]
    )
    norm = float(total)
    if not math.isfinite(norm):
        bad = next(name for name, parameter in given.items() if not bool(torch.isfinite(parameter.grad).all()))  # type: ignore[arg-type]
        raise NonFinite(job, f"gradient (of {bad})", own, own)
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


def update(job: Job, gradients: Gradients) -> Outcome:
    """A job's optimiser step on gradients that are there."""
    lr = float(job.optimizer.param_groups[0]["lr"])
    job.optimizer.step()
    increment_version(job.params.values())  # a fused step does not; what is kept from before it has to be known as old
    job.schedule.step()
    tokens = sum(row.tokens for row in gradients.rows if row.job == job.name)
    job.advance()
    scores = dict(gradients.scores[job.name])
    loss, targets = scores.pop("loss"), gradients.sizes[job.name].targets
    return Outcome(loss, gradients.norms[job.name], lr, tokens, targets, scores)

"""One optimiser step of several jobs: what all rules of stepping share.

The rows of the jobs run together in micro-batches, and each job then takes its own update by its rule (`updates/rules.py`).
A job's loss is the sum over the supervised tokens of its whole step divided by their number, or what its objective makes of the pairs
of the whole step (`objectives/`). It is the same however the step is cut into micro-batches. Jobs share nothing but the pass over
the base.

    begin             rows and sizes of a step, and what objectives measure before its losses
    sums_by_row       from the losses of tokens to those of rows
    loss_of           what a micro-batch adds to the losses of its jobs
    backward          from a loss to gradients
    scores_of         scores of one job; refuses a loss that is not finite
    finished          after the update: schedule, position, and the numbers for the records
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from functools import cached_property

import torch
from torch import Tensor

from graft.errors import GraftError, listed
from graft.training.batching import Batcher
from graft.training.forward.causal import Forward
from graft.training.job import Job
from graft.training.objectives import Marked, Policy, Scores, Size, Supervised
from graft.training.passes import Passes
from graft.training.rows import Row, by_job

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
class Begun:
    """A step before its losses."""

    rows: dict[str, list[Row]]
    """Rows of each job, in the job's own order."""
    sizes: dict[str, Size]
    """What the sums of each job are divided by."""
    ran: list[Row]
    """The rows that objectives measure beforehand, in the order in which they ran; mostly none."""
    sums_R: Tensor
    """The summed target losses of each of these rows, on the CPU."""

    @property
    def to_run(self) -> list[Row]:
        """The rows that make the losses."""
        ahead = set(self.ran)
        return [row for own in self.rows.values() for row in own if row not in ahead]


@dataclass(frozen=True)
class Ran:
    """What the passes of a step gave."""

    rows: list[Row]
    """All rows in the order in which they ran, [R]."""
    sums_R: Tensor
    """The summed target losses of each row, on the CPU."""
    added: Mapping[str, Mapping[str, Tensor | float]] = field(default_factory=dict)
    """Adapter -> name -> a loss that the adapter added."""

    @cached_property
    def by_job(self) -> dict[str, tuple[list[Row], Tensor]]:
        """The rows of each job, and their sums."""
        places = by_job(self.rows)
        order = [at for own in places.values() for at in own]
        sums = self.sums_R[order].split([len(own) for own in places.values()])
        return {
            name: ([self.rows[at] for at in own], own_sums)
            for (name, own), own_sums in zip(places.items(), sums, strict=True)
        }


@dataclass(frozen=True)
class Gradient:
    """What is known of one job's gradient once it is finite and clipped. The gradient itself is where the job's rule keeps it."""

    scores: Scores
    """The loss and what else the objective tells of the step."""
    norm: float
    """Before clipping."""
    tokens: int
    targets: int
    slopes: Mapping[int, float] = field(default_factory=dict)
    """Of the rule `zeroth`: the slope of the loss along the noise of each key, clipped. The others have none."""


def begin(forward: Forward, jobs: Sequence[Job], batcher: Batcher) -> Begun:
    """The rows of the next step of these jobs, after running what objectives measure before the losses, without gradients."""
    rows = {job.name: job.rows() for job in jobs}
    sizes = {job.name: job.objective.size(rows[job.name]) for job in jobs}
    measuring = {job.name: job.objective for job in jobs if isinstance(job.objective, Marked)}
    first = [row for name, objective in measuring.items() for row in objective.first(rows[name])]
    ran, sums_R = run_rows(forward, first, batcher, jobs) if first else ([], torch.zeros(0))
    own = Ran(ran, sums_R).by_job if ran else {}
    for name, objective in measuring.items():
        sizes[name] = objective.measured(sizes[name], *own[name])
    return Begun(rows, sizes, ran, sums_R)


def run_rows(
    forward: Forward, rows: Sequence[Row], batcher: Batcher, jobs: Sequence[Job], seeded: bool = True
) -> tuple[list[Row], Tensor]:
    """Run rows without gradients, on all ranks: the rows in the order in which they ran, and the sums of each on the CPU."""
    passes = Passes(batcher, rows)
    with torch.no_grad(), passes.own() as micros:
        for micro in micros:
            passes.note(sums_by_row(forward.losses(*batcher.inputs(micro, forward.device, seeded)), micro, jobs))
        for micro in passes.spare:
            forward.losses(*batcher.inputs(micro, forward.device, seeded))
    return passes.exchange()[:2]


def sums_by_row(losses_N: Tensor, rows: Sequence[Row], jobs: Sequence[Job]) -> Tensor:
    """Sum the losses of each row's targets: [R], in float64 where the device has it, since pairs are about differences of sums.

    Rows of a job that learns from drawn answers have the sum that its objective makes of them.
    """
    counts = torch.tensor([row.targets for row in rows], device=losses_N.device)
    exact = losses_N if losses_N.device.type == "mps" else losses_N.double()
    # unsafe: a check of the lengths would make the CPU wait for the device
    sums_R = torch.segment_reduce(exact, "sum", lengths=counts, unsafe=True)
    policies = {job.name: job.objective for job in jobs if isinstance(job.objective, Policy)}
    if not policies:
        return sums_R
    parts = zip(exact.split([row.targets for row in rows]), sums_R, rows, strict=True)
    return torch.stack(
        [policies[row.job].of_row(own, row.example) if row.job in policies else total for own, total, row in parts]
    )


def loss_of(jobs: Sequence[Job], rows: Sequence[Row], sums_R: Tensor, sizes: Mapping[str, Size]) -> Tensor:
    """What a micro-batch adds to the losses of its jobs, as one sum.

    Each job's share depends on its own adapter alone, so the gradient of the sum gives every adapter the gradient of its own loss.
    """
    objectives = {job.name: job.objective for job in jobs}
    weights, total = [0.0] * len(rows), sums_R.new_zeros(())
    for name, own in by_job(rows).items():
        objective, own_rows = objectives[name], [rows[at] for at in own]
        if isinstance(objective, Supervised):  # one product for all of them
            for at, weight in zip(own, objective.weights(own_rows, sizes[name]), strict=True):
                weights[at] = weight
        else:
            total = total + objective.share(own_rows, sums_R[own], sizes[name])
    if any(weights):
        total = total + (sums_R * sums_R.new_tensor(weights)).sum()
    return total


def backward(jobs: Sequence[Job], loss: Tensor) -> None:
    """Run backward from a loss of these jobs. Raises `GraftError` if it depends on none of their parameters."""
    if not loss.requires_grad:
        refuse_missing(jobs[0], list(jobs[0].params))
    loss.backward()


def refuse_missing(job: Job, missing: Sequence[str]) -> None:
    """Raise `GraftError` if the loss does not depend on some of a job's parameters."""
    if missing:
        raise GraftError(
            f"{len(missing)} of {len(job.params)} parameters of '{job.name}' get no gradient, among them '{missing[0]}': "
            "the loss does not depend on them. "
            + ("Choose other sites" if job.trainable.adapter else "Name other parts in train.method")
        )


def scores_of(job: Job, begun: Begun, ran: Ran) -> Scores:
    """What the job's objective tells of the step. Raises `NonFinite` if the loss is not finite."""
    own, sums = ran.by_job[job.name]
    scores = job.objective.scores(own, sums)
    added = {name: float(value) for name, value in ran.added.get(job.trainable.adapter or "", {}).items()}
    scores = {**scores, "loss": scores["loss"] + sum(added.values()), **added}
    if not math.isfinite(scores["loss"]):
        rows = begun.rows[job.name]
        suspects = [row for row, each in zip(own, sums.tolist(), strict=True) if not math.isfinite(each)]
        raise NonFinite(job, "loss", rows, suspects or rows)
    return scores


def finished(job: Job, gradient: Gradient, lr: float) -> Outcome:
    """Move a job on after its parameters took their update with this learning rate."""
    job.optimizer._opt_called = True  # pyright: ignore  # a bank or another rank may have taken its step; the schedule asks for one
    job.schedule.step()
    job.advance()
    scores = dict(gradient.scores)
    return Outcome(scores.pop("loss"), gradient.norm, lr, gradient.tokens, gradient.targets, scores)

"""A bank: what jobs of one shape train, as the rows of one tensor.

With J rows of P values each, parameters, gradients and both moments of AdamW are tensors [J, P], and what a job trains is views of its own
row. So a step of many jobs is a few calls: one for the norms, one to clip, and one update for the jobs of each learning rate, by the
kernel that a job's own optimiser runs. The factors of all jobs at a module are one view (`injection/stacks.py`).

A bank is a place in memory and no more. Every job keeps its optimiser, whose state is views as well: checkpoints, offloading and resuming
know of no bank, and a job that cannot be updated with the others (a parameter got no gradient) takes its own step. A job that leaves frees
its row for another, and nobody else's numbers move.

Legend: J rows, P values of a job, K parameters of a job.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import accumulate, pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.optim.adamw import AdamW, adamw

from graft.injection.stacks import Stack
from graft.training.job import Job

MOMENTS = ("exp_avg", "exp_avg_sq")
"""The tensors of a parameter in the state of AdamW, besides `step`."""
_mul_, _zero_, _norm = torch._foreach_mul_, torch._foreach_zero_, torch._foreach_norm  # pyright: ignore[reportPrivateImportUsage]


def shape_of(job: Job) -> Any:
    """Return what jobs of one bank have in common; None for a job that belongs to none."""
    optimizer, params = job.optimizer, list(job.params.values())
    fused = type(optimizer) is AdamW and all(each["fused"] and not each["amsgrad"] for each in optimizer.param_groups)
    if not fused or job.trainable.adapter is None or job.config.accumulate_in == "float32":
        return None
    if len({(each.dtype, each.device) for each in params}) > 1:
        return None
    groups = tuple(len(group["params"]) for group in optimizer.param_groups)
    shapes = tuple((name, tuple(each.shape)) for name, each in job.params.items())
    return shapes, groups, params[0].dtype, params[0].device


class Bank:
    """Rows for jobs of one shape, which join it in this order."""

    def __init__(self, jobs: Sequence[Job]) -> None:
        self.shape, first, count = shape_of(jobs[0]), list(jobs[0].params.values()), len(jobs)
        self.row_of: dict[Job, int] = {}
        self.uneven: set[Job] = set()
        """Jobs whose parameters took unlike numbers of steps."""
        self.updated: set[Job] = set()
        """Jobs that took their update together in this step."""
        self.free = list(range(count))
        self.sizes, self.shapes = [each.numel() for each in first], [each.shape for each in first]
        ends = list(accumulate(self.sizes, initial=0))
        self.ends = ends
        counts = accumulate((len(group["params"]) for group in jobs[0].optimizer.param_groups), initial=0)
        self.groups = [(slice(*own), slice(ends[own[0]], ends[own[1]])) for own in pairwise(counts)]
        """The parameters, and the columns, of each group of the optimiser."""
        self.masters = first[0].new_empty(count, ends[-1], requires_grad=False)
        self.moments = {key: torch.empty(0) for key in MOMENTS}
        self.steps = torch.zeros(count, len(first), device=first[0].device)
        for job in jobs:
            self._place(job)
        for key in MOMENTS:  # one after the other, so that no more than one exists twice
            self.moments[key] = torch.zeros_like(self.masters)
            for job in jobs:
                self._hold(job, key)
        self.gradients = torch.zeros_like(self.masters)
        self.written = np.zeros((count, len(first)), bool)
        """[J, K]: which gradients were added to past autograd in this step."""
        self._gradients = [self._views(self.gradients, row) for row in range(count)]
        self.anchor = first[0].new_zeros(()).requires_grad_()
        self.stack = Stack()

    def add(self, job: Job) -> None:
        """Give a job a row that is free."""
        self._place(job)
        self.hold(job)

    def hold(self, job: Job) -> None:
        """Bring the state of a job's optimiser into its row, after the optimiser itself took a step."""
        for key in MOMENTS:
            self._hold(job, key)

    def _place(self, job: Job) -> None:
        self.row_of[job] = row = self.free.pop(0)
        job.bank = self
        with torch.no_grad():
            for parameter, view in zip(job.params.values(), self._views(self.masters, row), strict=True):
                parameter.data, parameter.grad = view.copy_(parameter), None

    def remove(self, job: Job) -> None:
        """Give a job tensors of its own, where it is in memory, and free its row."""
        for parameter in job.params.values() if job.resident else ():
            parameter.data, parameter.grad = parameter.data.clone(), None
            state = job.optimizer.state.get(parameter, {})
            state.update({key: each.clone() for key, each in state.items()})
        row, job.bank = self.row_of.pop(job), None
        self.free.append(row)
        self.uneven.discard(job)
        for tensor in self.moments.values():
            tensor[row] = 0
        self.steps[row] = 0

    def _hold(self, job: Job, key: str) -> None:
        row, counts = self.row_of[job], set[float]()
        views = self._views(self.moments[key], row)
        for number, (parameter, view) in enumerate(zip(job.params.values(), views, strict=True)):
            state = job.optimizer.state.get(parameter, {})
            if state:
                state[key] = view.copy_(state[key])
                state["step"] = self.steps[row, number].copy_(state["step"])
            counts.add(float(state.get("step", 0)))
        (self.uneven.add if len(counts) > 1 else self.uneven.discard)(job)

    def _views(self, tensor: Tensor, row: int) -> list[Tensor]:
        """The views of a row [P] in the shapes of the parameters."""
        parts = tensor[row].split(self.sizes)
        return [part.view(shape) for part, shape in zip(parts, self.shapes, strict=True)]

    def matrices(self, tensor: Tensor, number: int) -> Tensor:
        """The view of a tensor [J, P] that has one parameter, by its number, of every row."""
        own = tensor[:, self.ends[number] : self.ends[number + 1]]
        return own.unflatten(1, self.shapes[number])

    def _rows(self, tensor: Tensor, jobs: Sequence[Job]) -> list[Tensor]:
        rows = tensor.unbind()
        return [rows[self.row_of[job]] for job in jobs]

    def clear(self, jobs: Sequence[Job]) -> None:
        """Drop the gradients of these jobs: a step begins."""
        self.updated -= set(jobs)
        _zero_(self._rows(self.gradients, jobs))
        self.written[[self.row_of[job] for job in jobs]] = False
        for job in jobs:
            for parameter in job.params.values():
                parameter.grad = None

    def collect(self, jobs: Sequence[Job]) -> None:
        """Bring the gradients of these jobs into their rows, those that autograd made and those that were added there already."""
        for job in jobs:
            row = self.row_of[job]
            written, views = self.written[row].tolist(), self._gradients[row]
            for parameter, own, view in zip(job.params.values(), written, views, strict=True):
                if parameter.grad is not None:
                    view.add_(parameter.grad)
                elif not own:
                    continue
                parameter.grad = view

    def whole(self, job: Job) -> bool:
        """Whether the job's update can be that of its row: all its parameters have a gradient, and took equally many steps."""
        return job not in self.uneven and all(parameter.grad is not None for parameter in job.params.values())

    def norms(self, jobs: Sequence[Job]) -> dict[Job, float]:
        """The norm of each job's gradient, after sums over ranks were taken back. Jobs that are not `whole` have none here."""
        for job in jobs:
            for parameter, view in zip(job.params.values(), self._gradients[self.row_of[job]], strict=True):
                if parameter.grad is not None and parameter.grad is not view:
                    view.copy_(parameter.grad)
                    parameter.grad = view
        whole = [job for job in jobs if self.whole(job)]
        found = torch.stack(_norm(self._rows(self.gradients, whole))).tolist() if whole else []
        return dict(zip(whole, found, strict=True))

    def clip(self, jobs: Sequence[Job], norms: Mapping[Job, float]) -> None:
        """Clip the gradients of these jobs to their `train.clip`, where that is set."""
        factors = [1.0 if (limit := job.config.clip) is None else min(1.0, limit / (norms[job] + 1e-6)) for job in jobs]
        if any(factor < 1 for factor in factors):
            _mul_(self._rows(self.gradients, jobs), factors)

    def update(self, jobs: Sequence[Job]) -> None:
        """Take the step of each job's optimiser, for those of them that are `whole`."""
        jobs = [job for job in jobs if self.whole(job)]
        tensors = [self._rows(each, jobs) for each in (self.masters, self.gradients, *self.moments.values())]
        for number, (params, columns) in enumerate(self.groups):
            alike: dict[Any, list[int]] = {}
            for at, job in enumerate(jobs):
                group = job.optimizer.param_groups[number]
                key = (group["lr"], *group["betas"], group["eps"], group["weight_decay"])
                alike.setdefault(key, []).append(at)
            for (lr, beta1, beta2, eps, decay), own in alike.items():
                masters, gradients, means, squares = ([each[at][columns] for at in own] for each in tensors)
                rows = [self.row_of[jobs[at]] for at in own]
                counts = [self.steps[row, params.start] for row in rows]
                adamw(
                    masters, gradients, means, squares, [], counts, fused=True, amsgrad=False, maximize=False,
                    lr=lr, beta1=beta1, beta2=beta2, eps=eps, weight_decay=decay,
                )  # fmt: skip
                self.steps[rows, params] = self.steps[rows, params.start : params.start + 1]
        self.updated |= set(jobs)
        for job in jobs:
            if not job.optimizer.state:
                self._give_state(job)

    def _give_state(self, job: Job) -> None:
        row = self.row_of[job]
        means, squares = (self._views(each, row) for each in self.moments.values())
        for parameter, count, *moments in zip(job.params.values(), self.steps[row], means, squares, strict=True):
            job.optimizer.state[parameter] = {"step": count, **dict(zip(MOMENTS, moments, strict=True))}


def by_bank(jobs: Sequence[Job]) -> dict[Bank, list[Job]]:
    """Return the jobs of each bank."""
    found: dict[Bank, list[Job]] = {}
    for job in jobs:
        if job.bank is not None:
            found.setdefault(job.bank, []).append(job)
    return found


def update_banks(jobs: Sequence[Job]) -> dict[str, Exception]:
    """Take the updates that jobs take together, before each is asked for its own; the error of those of a bank that failed, by job."""
    failures: dict[str, Exception] = {}
    for bank, own in by_bank(jobs).items():
        try:
            bank.update(own)
        except Exception as error:
            failures |= {job.name: error for job in own}
    return failures

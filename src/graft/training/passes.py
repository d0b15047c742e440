"""The passes of a step: every rank runs its own rows, and then all ranks know the losses of all rows.

    passes = Passes(batcher, rows)
    with passes.own() as micros:       the micro-batches of this rank; its errors wait
        for micro in micros:
            passes.note(sums_R)
    rows, sums_R, _ = passes.exchange()      raises the error of any rank on all

With one process nothing is exchanged, and rows come in the order in which they ran.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import TypeVar

import torch
from torch import Tensor, nn

from graft.distributed.failures import RankLost
from graft.distributed.group import Group
from graft.distributed.shares import Shares
from graft.training.batching import Batcher
from graft.training.job import Job
from graft.training.rows import Row

T = TypeVar("T")
GROUPS = 8
"""Groups of jobs with micro-batches of their own, for each stage of a pipeline: with one of each, a stage waits for at most a ninth of a
step."""
BUCKET = 1 << 26
"""Most values that are summed over ranks in one message."""


class Passes:
    """The passes over some rows, of all ranks."""

    def __init__(self, batcher: Batcher, rows: Sequence[Row]) -> None:
        self.shares = shares = batcher.shares
        self.group = shares.group
        if shares.mode == "pipeline":  # all run all rows, and the last has their losses
            self._own = batcher.cut_apart(rows, GROUPS * self.group.size)
            self.plans = [[]] * (self.group.size - 1) + [self._own]
        else:
            self.plans = [batcher.cut(share) if share else [] for share in batcher.dealt(rows)]
            self._own = self.plans[self.group.rank]
        most = max(map(len, self.plans)) if shares.mode == "fsdp2" else 0
        self.spare: list[list[Row]] = [_shortest(rows)] * (most - len(self.plans[self.group.rank]))
        """Passes without effect, where the base is in parts: every rank has to make as many, since all of them gather the weights."""
        self._sums: list[Tensor] = []
        self._error: Exception | None = None

    @contextmanager
    def own(self) -> Iterator[list[list[Row]]]:
        """The micro-batches of this rank, for a block of code that runs them. An error of the block is kept for `exchange`."""
        try:
            yield self._own
        except RankLost:
            raise
        except Exception as error:
            if self.shares.in_passes:  # the others wait in the middle of a pass
                raise RankLost(
                    f"a pass failed on rank {self.group.rank} in step {self.group.step + 1}, which ends a run with its base in parts "
                    f"({self.shares.mode}): {type(error).__name__}: {error}"
                ) from error
            self._error = error
            self._sums = []

    def both_ways(self, forward: Callable[[list[Row]], T], backward: Callable[[T], None]) -> None:
        """Run the micro-batches of `own` forward, and what each gives backward: at once or, in a pipeline, when later stages are busy."""
        begun: deque[T] = deque()
        for micro in self._own:
            begun.append(forward(micro))
            if len(begun) == self.shares.ahead:
                backward(begun.popleft())
        while begun:
            backward(begun.popleft())

    def note(self, sums_R: Tensor) -> None:
        """Note the summed losses of the rows of a micro-batch that ran, in the order of `own`."""
        if self.shares.sees_losses:
            self._sums.append(sums_R.detach())

    def exchange(self, numbers: Sequence[float] = ()) -> tuple[list[Row], Tensor, list[float]]:
        """All rows [R] in the order of the ranks, the sums of each on the CPU, and these numbers summed over ranks.

        Raises the error of the first rank that has one, on every rank.
        """
        if self.group.size == 1 and self._error is not None:
            raise self._error
        rows = [row for plan in self.plans for micro in plan for row in micro]
        own = torch.cat(self._sums).cpu() if self._sums else torch.zeros(0, dtype=torch.float64)
        if self.group.size == 1:
            return rows, own, list(numbers)
        start = sum(len(micro) for plan in self.plans[: self.group.rank] for micro in plan)
        sent = torch.zeros(len(rows) + len(numbers) + 1, dtype=torch.float64)
        if self._error is None:
            sent[start : start + len(own)] = own
            sent[len(rows) : -1] = torch.tensor(list(numbers), dtype=torch.float64)
        sent[-1] = self._error is not None
        self.group.sum_(sent)
        if sent[-1] > 0:
            self.group.settle(self._error)
        return rows, sent[: len(rows)], sent[len(rows) : -1].tolist()


def check_equal(shares: Shares, jobs: Sequence[Job]) -> None:
    """Raise `GraftError`, on all ranks, if a job that lives on all of them has other weights on some."""
    shared = [job for job in jobs if job.name not in shares.homes and job.resident]
    if shares.group.size == 1 or not shared:
        return
    sums = {job.name: [float(each.detach().double().sum()) for each in job.params.values()] for job in shared}
    shares.group.same({f"the weights of '{name}'": str(each) for name, each in sums.items()})


def _shortest(rows: Sequence[Row]) -> list[Row]:
    return [replace(min(rows, key=lambda row: row.tokens), share=0.0)]


def sum_gradients(group: Group, parameters: Sequence[nn.Parameter], present: Sequence[bool]) -> None:
    """Sum gradients over ranks, in float32 or wider. present: which parameters have one on any rank; the others keep none."""
    for bucket in _buckets([each for each, there in zip(parameters, present, strict=True) if there]):
        wide = torch.promote_types(bucket[0].dtype, torch.float32)
        flat = group.sum_(torch.cat([_gradient(each).to(wide).flatten() for each in bucket]))
        for parameter, summed in zip(bucket, flat.split([each.numel() for each in bucket]), strict=True):
            if parameter.grad is None:
                parameter.grad = torch.empty_like(parameter)
            parameter.grad.copy_(summed.view_as(parameter))


def _buckets(parameters: Sequence[nn.Parameter]) -> Iterator[list[nn.Parameter]]:
    """Parameters of one device and format together, at most `BUCKET` values unless one alone has more."""
    filling: dict[tuple[torch.device, torch.dtype], list[nn.Parameter]] = {}
    sizes: Counter[tuple[torch.device, torch.dtype]] = Counter()
    for parameter in parameters:
        kind = parameter.device, parameter.dtype
        if kind in filling and sizes[kind] + parameter.numel() > BUCKET:
            yield filling.pop(kind)
            sizes[kind] = 0
        filling.setdefault(kind, []).append(parameter)
        sizes[kind] += parameter.numel()
    yield from filling.values()


def _gradient(parameter: nn.Parameter) -> Tensor:
    return torch.zeros_like(parameter) if parameter.grad is None else parameter.grad

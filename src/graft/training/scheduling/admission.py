"""Choose the jobs that are in memory, and those that take the next step.

Jobs are in order: higher priority first, then first come, first served. `admit` takes as many as fit from the front, and
passes over one that does not fit; once that one fits, it comes in and jobs after it may have to leave. Where fewer jobs may
share a step than are in memory, `window` chooses those of similar length that waste the least padding, as ASPEN does
(arXiv 2312.02515v1). The job that has waited longest is always among them, so that none starves.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import groupby

from graft.training.job import Job


def in_order(jobs: Sequence[Job]) -> list[Job]:
    """Sort jobs by priority, highest first, then by arrival."""
    return sorted(jobs, key=lambda job: (-job.priority, job.arrival))


def admit(jobs: Sequence[Job], most: int | None, fits: Callable[[Sequence[Job]], bool]) -> list[Job]:
    """Choose the jobs that are to be in memory, from jobs in order.

    most: largest number of them. fits: whether jobs fit into memory together. The first job is always chosen; where it does not fit even
    alone, it runs and the error of its step says so.
    """
    chosen: list[Job] = []
    for job in jobs:
        if most is not None and len(chosen) == most:
            break
        if not chosen or fits([*chosen, job]):
            chosen.append(job)
    return chosen


def window(jobs: Sequence[Job], together: int | None, length: Callable[[Job], int]) -> list[Job]:
    """Choose the jobs that take the next step, from jobs in order.

    together: largest number of them. length: tokens of the longest sample in a job's next step.
    """
    chosen: list[Job] = []
    for _, equals in groupby(jobs, key=lambda job: job.priority):
        group = list(equals)
        room = len(group) if together is None else together - len(chosen)
        chosen += group if len(group) <= room else _least_waste(group, room, length)
    return chosen


def _least_waste(group: Sequence[Job], size: int, length: Callable[[Job], int]) -> list[Job]:
    """Choose the `size` jobs that waste the least padding next to the longest of them, among them the job that has waited longest.

    For example, a has waited longest, the lengths are a 20, b 50, c 22, d 21, and size is 3. By length the others are b, c, d, so the
    windows are [a b c] with a waste of 30 + 28 and [a c d] with 2 + 1; the second is chosen.
    """
    if size == 0:
        return []
    due = min(group, key=lambda job: (job.last, job.arrival))
    lengths = {job.name: length(job) for job in group}
    others = sorted((job for job in group if job is not due), key=lambda job: -lengths[job.name])

    def waste(some: Sequence[Job]) -> int:
        return sum(max(lengths[job.name] for job in some) - lengths[job.name] for job in some)

    windows = [[due, *others[start : start + size - 1]] for start in range(len(group) - size + 1)]
    return in_order(min(windows, key=waste))

"""Passes without an update, before the first step: does the longest batch fit into memory, and how much does a step take?"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext

import torch

from graft.config.activations import Activations
from graft.errors import GraftError
from graft.training.batching import Batcher, num_tokens
from graft.training.forward.causal import Forward
from graft.training.forward.modes import evaluating
from graft.training.job import Job
from graft.training.job_pool import JobPool
from graft.training.out_of_memory import explained
from graft.training.rows import Row
from graft.training.scheduling.memory import measuring
from graft.training.updates.rules import rule_of


def fullest(jobs: Sequence[Job], batcher: Batcher) -> list[Row]:
    """The fullest micro-batch that a joint step of these jobs can have."""
    rows = [row for job in jobs for row in batcher.longest(job)]
    return max(batcher.cut(rows), key=num_tokens)


def run_dry(forward: Forward, jobs: Sequence[Job], rows: Sequence[Row], batcher: Batcher) -> None:
    """Run these rows of these jobs without a trace: random generators stay as they are.

    They run backward too if the rule of any of the jobs does.
    """
    rule = next((rule_of(job) for job in jobs if rule_of(job).backward), None)
    with torch.random.fork_rng([forward.device] if forward.device.type == "cuda" else []):
        with evaluating(forward.model) if rule is None else nullcontext():
            losses_N = forward.losses(*batcher.inputs(rows, forward.device))
        if rule is not None:
            rule.discard(jobs, losses_N.sum())


def try_fullest(forward: Forward, jobs: Sequence[Job], batcher: Batcher, activations: Activations = "keep") -> None:
    """Run the fullest micro-batch dry, so that one that does not fit fails now and not in an hour.

    Raises `GraftError`, which says what helps, where the device has not enough memory.
    """
    rows = fullest(jobs, batcher)
    failed = _failure(forward, jobs, rows, batcher)
    if failed is not None:
        raise explained(failed, forward, jobs[0], batcher, activations, rows)


def check_memory(
    forward: Forward, pool: JobPool, jobs: Sequence[Job], activations: Activations, resumed: bool
) -> str | None:
    """Try the longest batch, and learn what a step takes where memory is limited; returns a warning, or None.

    jobs: those that live here.
    """
    with pool.batcher.shares.group.agreed():
        if forward.device.type == "cuda" and not resumed and jobs:
            try_fullest(forward, jobs, pool.batcher, activations)
    if not pool.measure(forward.device):
        return None
    if not pool.memory.seen:
        calibrate(forward, pool)
    return pool.too_large()


def _failure(forward: Forward, jobs: Sequence[Job], rows: Sequence[Row], batcher: Batcher) -> Exception | None:
    """Run dry; the error, whose frames the caller can then let go."""
    try:
        run_dry(forward, jobs, rows, batcher)
    except (RuntimeError, MemoryError) as error:
        return error
    return None


def calibrate(forward: Forward, pool: JobPool) -> None:
    """Measure the fullest micro-batch, its shorter half and its shortest quarter, so that the memory of a step is known before the first.

    Raises `GraftError` where this system cannot measure peak memory.
    """
    rows = sorted(fullest(pool.live, pool.batcher), key=lambda row: row.tokens)
    arrivals = {job.name: job.arrival for job in pool.jobs}
    for share in (1, 2, 4):
        count = -(-len(rows) // share)  # rounded up
        micro = sorted(rows[:count], key=lambda row: arrivals[row.job])  # the rows of a job side by side
        with measuring(forward.device) as peak:
            run_dry(forward, pool.live, micro, pool.batcher)
        pool.observe(pool.load(micro), peak.num_bytes)
    if not pool.memory.seen:
        raise GraftError(
            "scheduler.memory needs measured peaks, which this system cannot give: set scheduler.resident instead"
        )

"""Passes without an update, before the first step: does the longest batch fit, and what memory does a step take?"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from graft.data.batches import Layout
from graft.errors import GraftError
from graft.training.batching import context_of, cut, lay_out, longest
from graft.training.forward.causal import Forward
from graft.training.job import Job
from graft.training.job_pool import JobPool
from graft.training.rows import Row
from graft.training.scheduling.memory import Load, measuring


def fullest(jobs: Sequence[Job], budget: int, layout: Layout) -> list[Row]:
    """The fullest micro-batch that these jobs can meet together."""
    rows = [row for job in jobs for row in longest(job, budget, layout)]
    return max(cut(rows, budget, layout), key=lambda some: sum(row.tokens for row in some))


def run_dry(forward: Forward, micro: Sequence[Row], layout: Layout, pad_id: int) -> None:
    """Forward and backward, without an update and without a trace."""
    batch = lay_out(micro, layout, pad_id).to(forward.device)
    with torch.random.fork_rng([forward.device] if forward.device.type == "cuda" else []):
        (forward.losses(batch, context_of(micro, layout)).sum() * 0.0).backward()


def try_fullest(forward: Forward, jobs: Sequence[Job], budget: int, layout: Layout, pad_id: int) -> None:
    """What does not fit shall fail now, not in an hour. Raises `GraftError` that says what helps."""
    micro = fullest(jobs, budget, layout)
    try:
        run_dry(forward, micro, layout, pad_id)
    except torch.OutOfMemoryError as error:
        raise GraftError(
            f"the longest batch ({sum(row.tokens for row in micro):,} tokens) does not fit into the memory of "
            f"{forward.device}: lower train.token_budget (now {budget}), set train.gradient_checkpointing: true, or lower "
            "data.max_length"
        ) from error


def calibrate(forward: Forward, pool: JobPool, pad_id: int) -> None:
    """Measure the fullest batch and parts of it, so that the memory of a step is known before the first."""
    micro = sorted(fullest(pool.live, pool.budget, pool.layout), key=lambda row: row.tokens)
    arrivals = {job.name: job.arrival for job in pool.jobs}
    for share in (1, 2, 4):
        rows = sorted(micro[: -(-len(micro) // share)], key=lambda row: arrivals[row.job])
        with measuring(forward.device) as peak:
            run_dry(forward, rows, pool.layout, pad_id)
        pool.observe(Load.of([row.tokens for row in rows], pool.layout == "padded"), peak.num_bytes)
    if not pool.memory.seen:
        raise GraftError("scheduler.memory needs measured peaks, which this system cannot give: set scheduler.resident")

"""From the rows of a step to micro-batches, and each of them to a batch and its forward pass."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from graft.data import batches
from graft.data.batches import Batch, Layout
from graft.routing.context import ForwardContext
from graft.training.job import Job
from graft.training.rows import Row
from graft.utils.clock import timed


@timed("batches")
def cut(rows: Sequence[Row], budget: int, layout: Layout) -> list[list[Row]]:
    """Micro-batches of at most `budget` tokens, padding counted; a longer sample stands alone. The rows of a sample stay together, those
    of a job lie side by side, its adapter's before its reference's."""
    samples: dict[tuple[int, int], list[Row]] = {}
    for row in rows:
        samples.setdefault((row.job, row.position), []).append(row)
    units = list(samples.values())
    widths = np.zeros((len(units), max(map(len, units)), 2), np.int64)
    for at, unit in enumerate(units):
        widths[at, : len(unit)] = [row.example.widths for row in unit]
    groups = batches.micro_batches(widths, range(len(units)), budget, layout)
    order = {name: at for at, name in enumerate(dict.fromkeys(row.job for row in rows))}
    return [
        sorted((row for at in sorted(group) for row in units[at]), key=lambda row: (order[row.job], row.view != "adapter"))
        for group in groups
    ]


def longest(job: Job, budget: int, layout: Layout) -> list[Row]:
    """A job's longest samples as one micro-batch: the fullest that a step can meet."""
    size = min(job.config.batch_size, len(job.train))
    samples = sorted(range(len(job.train)), key=lambda index: -int(job.train.lengths[index]))[:size]
    rows = [row for position, sample in enumerate(samples) for row in job.rows_of(job.train[sample], sample, position)]
    return max(cut(rows, budget, layout), key=lambda micro: sum(row.tokens for row in micro))


@timed("batches")
def lay_out(rows: Sequence[Row], layout: Layout, pad_id: int) -> Batch:
    """The rows as one batch."""
    examples, samples = [row.example for row in rows], [row.sample for row in rows]
    return batches.flat(examples, samples) if layout == "flat" else batches.padded(examples, samples, pad_id)


@timed("batches")
def context_of(rows: Sequence[Row], layout: Layout, seeded: bool = True) -> ForwardContext:
    """Whose rows these are and where they lie. An encoder-decoder's rows have two lengths, so none is said: dropout then also covers
    padding, which changes nothing before it."""
    names = tuple(row.adapter for row in rows)
    return ForwardContext(
        names[0] if len(set(names)) == 1 else names,
        lengths=None
        if any(row.example.answer is not None for row in rows)
        else tuple(row.tokens for row in rows),
        flat=layout == "flat",
        seeds=tuple(row.seed for row in rows) if seeded else None,
        prompt_seeds={row.job: row.prompt_seed for row in rows} if seeded else None,
    )

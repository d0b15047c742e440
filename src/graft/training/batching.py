"""From the rows of a step to micro-batches, and from a micro-batch to what the forward pass takes: a batch and its context."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch

from graft.data import batches
from graft.data.batches import Batch, Layout, Twins, samples_of_step
from graft.distributed.shares import Shares, lightest_first
from graft.routing.context import ForwardContext
from graft.training.job import Job
from graft.training.rows import Row, by_job, units
from graft.utils.clock import timed

FULLEST = 4
"""Steps of an epoch that are cut to find the fullest micro-batch of a run."""


@dataclass(frozen=True)
class Batcher:
    """How the rows of a run become batches. A run that decides on another layout makes another batcher: `replace(batcher, layout=...)`."""

    budget: int
    """Most tokens of a micro-batch, padding counted."""
    layout: Layout
    pad_id: int
    """Token id of padding. The attention mask says where padding is, so any token serves."""
    shares: Shares = field(default_factory=Shares)
    """Which rank runs which rows."""

    def dealt(self, rows: Sequence[Row]) -> list[list[Row]]:
        """The rows that each rank runs. Rows that stay together (`units`) go to one rank."""
        if self.shares.group.size == 1:
            return [list(rows)]
        dealt = units(rows)
        weights = [(unit[0].job, num_tokens(unit)) for unit in dealt]
        return [[row for at in own for row in dealt[at]] for own in self.shares.deal(weights)]

    @timed("batches")
    def cut(self, rows: Sequence[Row]) -> list[list[Row]]:
        """Cut rows into micro-batches of at most `budget` tokens. A sample that is longer than the budget is alone in its micro-batch.

        Samples are taken longest first, and each joins the last micro-batch while the budget holds. All rows of a sample (the sides of
        a pair, and those of the reference) stay in one micro-batch, and so do all of a step that a loss compares. There, the rows of a
        job lie side by side, those of its adapter before those of its reference, so that each adapter runs on one slice of the batch.

        For example, job a has samples of 9, 5 and 4 tokens, job b of 7 and 3, and the budget is 16:

            flat      [a9 b7] is 16 tokens       [a5 a4 b3] is 12
            padded    [a9] is 9, since [a9 b7] would be 2 x 9       [a5 b7] is 2 x 7       [a4 b3] is 2 x 4
        """
        whole = units(rows)
        # [units, rows of a unit, 2]: what is read and what a decoder writes; zeros where a unit has fewer rows
        widths = np.zeros((len(whole), max(map(len, whole)), 2), np.int64)
        for at, unit in enumerate(whole):
            widths[at, : len(unit)] = [row.example.widths for row in unit]
        groups = batches.micro_batches(widths, range(len(whole)), self.budget, self.layout)
        job_order = {name: at for at, name in enumerate(dict.fromkeys(row.job for row in rows))}
        return [
            sorted(
                (row for at in sorted(group) for row in whole[at]),
                key=lambda row: (job_order[row.job], row.view != "adapter"),
            )
            for group in groups
        ]

    def cut_apart(self, rows: Sequence[Row], groups: int) -> list[list[Row]]:
        """Cut rows as `cut` does, those of each job by themselves, so that there are more micro-batches. Jobs beyond a number of groups
        share them, the heaviest with the lightest."""
        jobs = [[rows[at] for at in own] for own in by_job(rows).values()]
        dealt = lightest_first([num_tokens(own) for own in jobs], groups, [0.0] * groups)
        return [
            micro for group in dealt if group for micro in self.cut([row for at in sorted(group) for row in jobs[at]])
        ]

    def longest(self, job: Job) -> list[Row]:
        """The fullest micro-batch that a step of this job alone can have: it is made of the job's longest samples."""
        size = min(job.config.batch_size, len(job.train))
        samples = sorted(range(len(job.train)), key=lambda index: -int(job.train.lengths[index]))[:size]
        rows = [row for at, sample in enumerate(samples) for row in job.rows_of(job.train[sample], sample, at)]
        return max(self.cut(rows), key=num_tokens)

    def fullest(self, job: Job) -> list[Row]:
        """The fullest micro-batch that the run of this job alone will have: its seed says which samples meet. Of each epoch, the steps
        with most tokens and the one with the longest sample are cut."""
        size, data = job.config.batch_size, job.train
        found: list[list[Row]] = []
        for epoch in range(math.ceil(job.steps / job.epoch_steps)):
            order = data.epoch_order(job.config.seed, epoch)
            starts = np.arange(0, len(order), size)[: job.steps - epoch * job.epoch_steps]
            order = order[: starts[-1] + size]
            tokens = np.add.reduceat(data.lengths[order], starts)
            longest = int(np.maximum.reduceat(data.lengths[order], starts).argmax())
            for step in {*np.argsort(-tokens, kind="stable")[:FULLEST].tolist(), longest}:
                samples = samples_of_step(data, order, size, step)
                rows = [row for at, sample in enumerate(samples) for row in job.rows_of(data[sample], sample, at)]
                found += self.cut(rows)
        return max(found, key=self.laid_out)

    def laid_out(self, rows: Sequence[Row]) -> int:
        """Tokens of these rows as one batch, padding counted."""
        return num_tokens(rows) if self.layout == "flat" else len(rows) * max(row.tokens for row in rows)

    @timed("batches")
    def batch(self, rows: Sequence[Row]) -> Batch:
        """Lay the rows out as one batch.

        For example, rows of the tokens 5 6 and 7 8 9, where 6 and 9 are supervised, and `pad_id` 0:

                             flat (padding-free)    padded
            input_ids        [[5 6 7 8 9]]          [[5 6 0] [7 8 9]]
            position_ids     [[0 1 0 1 2]]          [[0 1 0] [0 1 2]]
            attention_mask   None                   [[1 1 0] [1 1 1]]
            target_index     [0 3]                  [0 4]                  counted along the tokens of all rows
            target_ids       [6 9]                  [6 9]

        The output at a token predicts the next one: 6 comes from the output at 5, and 9 from that at 8.
        """
        examples, samples = [row.example for row in rows], [row.sample for row in rows]
        made = (
            batches.flat(examples, samples) if self.layout == "flat" else batches.padded(examples, samples, self.pad_id)
        )
        return replace(made, twins=twins_of(rows))

    @timed("batches")
    def context(self, rows: Sequence[Row], seeded: bool = True) -> ForwardContext:
        """Say which adapter each row runs through, where it lies and what seeds its dropout. Without `seeded` there are no seeds.

        Rows that a decoder answers have two lengths, so the context has none. Dropout then also covers padding, which changes
        nothing before it.
        """
        names = tuple(row.adapter for row in rows)
        two_lengths = any(row.example.answer is not None for row in rows)
        return ForwardContext(
            names[0] if len(set(names)) == 1 else names,
            lengths=None if two_lengths else tuple(row.tokens for row in rows),
            flat=self.layout == "flat",
            seeds=tuple(row.seed for row in rows) if seeded else None,
            pass_seeds=tuple(row.pass_seed for row in rows) if seeded else None,
            loss_shares=tuple(row.share for row in rows),
            losses={} if seeded else None,
        )

    def inputs(self, rows: Sequence[Row], device: torch.device, seeded: bool = True) -> tuple[Batch, ForwardContext]:
        """The batch of these rows on a device, and its context: the arguments of `Forward.losses`."""
        return self.batch(rows).to(device), self.context(rows, seeded)


def twins_of(rows: Sequence[Row]) -> Twins | None:
    """Return which targets of these rows two passes of a sample predict; None if no sample has both of its passes here."""
    starts = [0, *itertools.accumulate(row.targets for row in rows)]
    first = {(row.job, row.position, row.part): at for at, row in enumerate(rows) if row.view == "adapter"}
    again = {(row.job, row.position, row.part): at for at, row in enumerate(rows) if row.view == "again"}
    pairs = [(first[key], at) for key, at in again.items() if key in first]
    if not pairs:
        return None
    numbers = [[np.arange(starts[at], starts[at + 1]) for at in side] for side in zip(*pairs, strict=True)]
    ahead, behind = (np.concatenate(each) for each in numbers)
    others = np.setdiff1d(np.arange(starts[-1]), np.concatenate([ahead, behind]))
    smoothing = np.concatenate([np.full(rows[at].targets, rows[at].smoothing) for at, _ in pairs])
    return Twins(*(torch.from_numpy(each) for each in (ahead, behind, others, smoothing)))


def num_tokens(rows: Sequence[Row]) -> int:
    """Tokens of these rows, padding not counted."""
    return sum(row.tokens for row in rows)

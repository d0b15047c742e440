"""The rule `stack`: gradients in 8 bits come to the optimiser's stack in backward, and the step pops them (QFT).

The norm that `train.clip` limits is that of the gradients as they lie on the stack. Several micro-batches, and several uses of one weight,
add up there.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from graft.training.job import Job
from graft.training.rows import Row
from graft.training.step import Gradient, NonFinite, Outcome, refuse_missing
from graft.training.updates.gradients import Gradients
from graft.training.updates.qft_lion import QFTLion


class Stack(Gradients):
    """Backward, then update. A step that fails has changed no weight."""

    def clip(self, job: Job, rows: Sequence[Row]) -> float:
        """Note the factor that clips the step; returns the norm of all gradients from before."""
        optimizer = qft_of(job)
        norms = optimizer.norms()
        if job.step == 1:
            refuse_missing(job, [name for name, each in job.params.items() if each not in norms])
        norm = float(torch.stack(list(norms.values())).norm())
        if not math.isfinite(norm):
            bad = next(name for name, each in job.params.items() if each in norms and not math.isfinite(norms[each]))
            raise NonFinite(job, f"gradient (of {bad})", rows, rows)
        limit = job.config.clip
        optimizer.factor = min(1.0, limit / (norm + 1e-6)) if limit is not None else 1.0
        return norm

    def update(self, job: Job, gradient: Gradient) -> Outcome:
        """Pop the stack. The outliers are chosen anew after the last step of an epoch."""
        qft_of(job).now = job.step
        outcome = super().update(job, gradient)
        refresh_if_due(job)
        return outcome


def qft_of(job: Job) -> QFTLion:
    """The optimiser of a job of QFT."""
    assert isinstance(job.optimizer, QFTLion)
    return job.optimizer


def refresh_if_due(job: Job) -> None:
    """Choose the outliers anew where an epoch has ended."""
    if job.batch == 0 and job.ended is None:
        qft_of(job).refresh()

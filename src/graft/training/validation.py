"""Validation loss: the mean over all supervised tokens of the validation data, in evaluation mode."""

from __future__ import annotations

import torch

from graft.data.batches import Layout
from graft.training.forward import Forward
from graft.training.job import Job, Row
from graft.training.modes import evaluating
from graft.training.step import cut, lay_out, pass_of


def validation_loss(forward: Forward, job: Job, budget: int, layout: Layout, pad_id: int) -> float:
    """Token-weighted loss of a job's adapter on its validation data."""
    assert job.validation is not None
    rows = [Row(job, example, sample, sample) for sample, example in enumerate(job.validation)]
    total, count = 0.0, 0
    with evaluating(forward.model):
        for micro in cut(rows, budget, layout):
            batch = lay_out(micro, layout, pad_id).to(forward.device)
            weights = torch.ones(len(batch.target_ids), device=forward.device)
            _, losses_N = forward.losses(batch, pass_of(micro, layout, seeded=False), weights)
            total, count = total + float(losses_N.double().sum()), count + len(losses_N)
    return total / count

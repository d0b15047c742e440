"""Validation: a job's scores on its validation data, in evaluation mode.

The loss is the mean over all targets, or what the objective makes of all pairs. Classification adds the accuracy; objectives over pairs add
their own scores.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from graft.training.batching import Batcher
from graft.training.forward.causal import Forward
from graft.training.forward.modes import evaluating
from graft.training.forward.tasks import LabelForward
from graft.training.job import Job
from graft.training.rows import Row
from graft.training.step import sums_by_row
from graft.utils.clock import timed


@timed("validation")
def validation_scores(forward: Forward, job: Job, batcher: Batcher) -> dict[str, float]:
    """Validate a job's adapter; its scores by their names in metrics.jsonl, such as `validation_loss`. The job has validation data."""
    assert job.validation is not None
    rows = [row for sample, example in enumerate(job.validation) for row in job.rows_of(example, sample, sample)]
    done: list[Row] = []
    sums: list[Tensor] = []
    right, classes = 0, isinstance(forward, LabelForward) and job.validation.labels.dtype.kind == "i"
    with evaluating(forward.model):
        for micro in batcher.cut(rows):
            batch, context = batcher.inputs(micro, forward.device, seeded=False)
            if isinstance(forward, LabelForward):  # its logits also say which answers are right
                logits = forward.logits(batch, context)
                losses_N = forward.losses_of(logits, batch)
                right += int((logits.argmax(-1) == batch.target_ids).sum()) if classes else 0
            else:
                losses_N = forward.losses(batch, context)
            done, sums = [*done, *micro], [*sums, sums_by_row(losses_N, micro).cpu()]
    scores = job.objective.scores(done, torch.cat(sums))
    if classes:
        scores["accuracy"] = right / len(rows)
    return {f"validation_{name}": value for name, value in scores.items()}


def in_words(scores: Mapping[str, float]) -> str:
    """Put validation scores into words."""
    said = f"validation loss {scores['validation_loss']:.4f}"
    said += f", accuracy {scores['validation_accuracy']:.1%}" if "validation_accuracy" in scores else ""
    return said + (f", margin {scores['validation_margin']:.3f}" if "validation_margin" in scores else "")

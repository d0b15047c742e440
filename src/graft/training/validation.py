"""Validation loss: the mean over all targets of the validation data, in evaluation mode; of classes the accuracy besides, of pairs the
objective, its rewards and how often they are right."""

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
    """The loss of a job's adapter on its validation data, of classification also the accuracy, of pairs what the objective tells besides;
    by the names they have in metrics.jsonl."""
    assert job.validation is not None
    rows = [row for sample, example in enumerate(job.validation) for row in job.rows_of(example, sample, sample)]
    done: list[Row] = []
    sums: list[Tensor] = []
    right, classes = 0, isinstance(forward, LabelForward) and job.validation.labels.dtype.kind == "i"
    with evaluating(forward.model):
        for micro in batcher.cut(rows):
            batch, context = batcher.inputs(micro, forward.device, seeded=False)
            if isinstance(forward, LabelForward):
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
    """Validation scores as a sentence tells them."""
    said = f"validation loss {scores['validation_loss']:.4f}"
    said += f", accuracy {scores['validation_accuracy']:.1%}" if "validation_accuracy" in scores else ""
    return said + (f", margin {scores['validation_margin']:.3f}" if "validation_margin" in scores else "")

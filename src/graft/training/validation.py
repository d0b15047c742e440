"""Validation: a job's scores on its validation data, in evaluation mode.

The loss is the mean over all targets, or what the objective makes of all pairs. Classification adds the accuracy; objectives over pairs add
their own scores. Supervised answers add the stop rate: the share of samples whose end mark has a probability above one half where the
answer ends, so that greedy decoding would end it there. Where the data leave open whether an answer goes on, it stays below one although
all generated answers end; and answers that end elsewhere do not count, as those of a base that knows nothing of the data yet.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence

from torch import Tensor

from graft.data.samples import Example
from graft.training.batching import Batcher
from graft.training.forward.causal import Forward
from graft.training.forward.modes import evaluating
from graft.training.forward.tasks import LabelForward
from graft.training.job import Job
from graft.training.objectives import Supervised
from graft.training.passes import Passes
from graft.training.rows import Row
from graft.training.step import sums_by_row
from graft.utils.clock import timed


def validation_scores(forward: Forward, job: Job, batcher: Batcher) -> dict[str, float]:
    """Validate a job's adapter; its scores by their names in metrics.jsonl, such as `validation_loss`. The job has validation data."""
    return measured(forward, job, batcher)()


@timed("validation")
def measured(forward: Forward, job: Job, batcher: Batcher) -> Callable[[], dict[str, float]]:
    """Run this rank's rows of a job's validation; what is returned gathers those of all ranks, and gives the scores.

    Ranks on which different jobs live so run their validations at the same time.
    """
    assert job.validation is not None
    rows = [
        row
        for sample, example in enumerate(job.validation)
        for row in job.rows_of(example, sample, sample, learning=False)
    ]
    passes, ends = Passes(batcher, rows), list[bool]()
    right, classes = 0, isinstance(forward, LabelForward) and job.validation.labels.dtype.kind == "i"
    with evaluating(forward.model), passes.own() as micros:
        for micro in micros:
            batch, context = batcher.inputs(micro, forward.device, seeded=False)
            if isinstance(forward, LabelForward):  # its logits also say which answers are right
                logits = forward.logits(batch, context)
                losses_N = forward.losses_of(logits, batch)
                right += int((logits.argmax(-1) == batch.target_ids).sum()) if classes else 0
            else:
                losses_N = forward.losses(batch, context)
                ends += _ends(losses_N, micro, job.stop_ids)
            passes.note(sums_by_row(losses_N, micro, [job]))
        for micro in passes.spare:
            forward.losses(*batcher.inputs(micro, forward.device, seeded=False))

    def scores() -> dict[str, float]:
        seen = [right, sum(ends), len(ends)] if batcher.shares.sees_losses else [0, 0, 0]
        done, sums_R, (all_right, ended, marked) = passes.exchange(seen)
        found = job.objective.scores(done, sums_R)
        if classes:
            found["accuracy"] = all_right / len(rows)
        if marked and isinstance(job.objective, Supervised):
            found["stop_rate"] = ended / marked
        return {f"validation_{name}": value for name, value in found.items()}

    return scores


def stop_rate(forward: Forward, job: Job, batcher: Batcher, samples: Sequence[Example]) -> float | None:
    """Return the stop rate on some samples (see above); None where no answer has an end mark. The adapter is active."""
    rows = [
        row
        for at, each in enumerate(samples)
        for row in job.rows_of(each, at, at, learning=False)
        if row.view == "adapter"
    ]
    ends: list[bool] = []
    with evaluating(forward.model):
        for micro in batcher.cut(rows):
            batch, context = batcher.inputs(micro, forward.device, seeded=False)
            ends += _ends(forward.losses(batch, context), micro, job.stop_ids)
    return sum(ends) / len(ends) if ends else None


def _ends(losses_N: Tensor, rows: Sequence[Row], stop_ids: Collection[int]) -> list[bool]:
    """Whether each row's last end mark is likelier than not; rows without one are left out. losses_N: those of the targets, row by row."""
    found, at, losses = [], 0, losses_N.detach().float().cpu()
    for row in rows:
        example = row.example
        targets = example.input_ids[example.supervised] if example.answer is None else example.answer
        marks = [place for place, token in enumerate(targets.tolist()) if token in stop_ids]
        if marks:
            found.append(bool(losses[at + marks[-1]] < math.log(2)))
        at += example.num_targets
    return found


def in_words(scores: Mapping[str, float]) -> str:
    """Put validation scores into words."""
    said = f"validation loss {scores['validation_loss']:.4f}"
    said += f", accuracy {scores['validation_accuracy']:.1%}" if "validation_accuracy" in scores else ""
    said += (
        f", {scores['validation_stop_rate']:.0%} of answers end where they do in the data"
        if "validation_stop_rate" in scores
        else ""
    )
    return said + (f", margin {scores['validation_margin']:.3f}" if "validation_margin" in scores else "")

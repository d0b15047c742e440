"""The rule `zeroth`: forward passes on both sides of the parameters along noise, no backward pass, then a step along the noise.

MeZO (Malladi et al. 2023, arXiv 2305.17333). The noise of a job comes from its seed and step alone, so company changes nothing. Both
passes are in evaluation mode: dropout would differ between them. The loss and scores of a step are means over its passes, which differ
from those at the parameters themselves by a term of the order of epsilon squared.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from contextlib import ExitStack
from typing import ClassVar

import torch
from torch import Tensor

from graft.training.batching import Batcher, num_tokens
from graft.training.forward.causal import Forward
from graft.training.forward.modes import evaluating
from graft.training.job import Job
from graft.training.objectives import Scores
from graft.training.rows import Row
from graft.training.step import Begun, Gradient, NonFinite, Outcome, Ran, begin, finished, run_rows, scores_of
from graft.training.updates.noise_sgd import NoiseSGD


class Zeroth:
    """Slopes along noise. A step that fails has put the parameters back (see `restore` of the method)."""

    backward: ClassVar[bool] = False

    def passes(self, job: Job) -> int:
        """Two for each direction."""
        return 2 * _optimizer(job).method.directions

    def prepare(self, forward: Forward, jobs: Sequence[Job], batcher: Batcher) -> dict[str, Gradient]:
        """The passes of the next step of these jobs, which run together; what is known of each job's gradient, by name."""
        scores: dict[str, list[Scores]] = defaultdict(list)
        slopes: dict[str, dict[int, float]] = defaultdict(dict)
        optimizers = {job.name: _optimizer(job) for job in jobs}
        with evaluating(forward.model):
            begun = begin(forward, jobs, batcher)
            for direction in range(max(each.method.directions for each in optimizers.values())):
                moved = [job for job in jobs if direction < optimizers[job.name].method.directions]
                losses = self._both_sides(forward, moved, batcher, begun, direction, scores)
                for job in moved:
                    above, below = losses[job.name]
                    slope = (above - below) / (2 * optimizers[job.name].method.epsilon)
                    slopes[job.name][_key(job, direction)] = slope
        return {job.name: _gradient(job, begun, scores[job.name], slopes[job.name]) for job in jobs}

    def _both_sides(
        self, forward: Forward, jobs: Sequence[Job], batcher: Batcher, begun: Begun, direction: int,
        scores: dict[str, list[Scores]],
    ) -> dict[str, list[float]]:  # fmt: skip
        """The losses of each job above and below its parameters along one direction, penalties included. `scores` gains those of both."""
        losses: dict[str, list[float]] = defaultdict(list)
        names = {job.name for job in jobs}
        rows = [row for row in begun.to_run if row.job in names]
        with ExitStack() as stack:
            moves = [stack.enter_context(_optimizer(job).moving(_key(job, direction))) for job in jobs if job.here]
            for side in (1, -1):
                for move in moves:
                    move(side)
                ran = _run(forward, rows, batcher, begun, jobs)
                for job in jobs:
                    penalty = job.penalty() if job.here else None
                    found = scores_of(job, begun, ran)
                    scores[job.name].append(found)
                    losses[job.name].append(found["loss"] + (0.0 if penalty is None else float(penalty)))
        return losses

    def discard(self, jobs: Sequence[Job], loss: Tensor) -> None:
        """There is nothing to run backward."""

    def rehearse(self, forward: Forward, job: Job, batcher: Batcher) -> None:
        """Run the passes: they leave the parameters as they were."""
        self.prepare(forward, [job], batcher)

    def update(self, job: Job, gradient: Gradient) -> Outcome:
        """Step along the noise of this step."""
        optimizer, lr = _optimizer(job), float(job.optimizer.param_groups[0]["lr"])
        optimizer.slopes = dict(gradient.slopes)
        optimizer.step()
        return finished(job, gradient, lr)


def _optimizer(job: Job) -> NoiseSGD:
    assert isinstance(job.optimizer, NoiseSGD)
    return job.optimizer


def _key(job: Job, direction: int) -> int:
    return _optimizer(job).key(job.config.seed, job.step, direction)


def _run(forward: Forward, rows: Sequence[Row], batcher: Batcher, begun: Begun, jobs: Sequence[Job]) -> Ran:
    """Run these rows without gradients."""
    ran, sums_R = run_rows(forward, rows, batcher, jobs, seeded=False)
    return Ran([*begun.ran, *ran], torch.cat([begun.sums_R, sums_R]))


def _gradient(job: Job, begun: Begun, scores: Sequence[Scores], slopes: dict[int, float]) -> Gradient:
    """Average the passes of a job, and clip its slopes by the norm that they estimate: a slope's mean square is the gradient's."""
    rows = begun.rows[job.name]
    mean = {name: sum(each[name] for each in scores) / len(scores) for name in scores[0]}
    norm = math.sqrt(sum(slope * slope for slope in slopes.values()) / len(slopes))
    if not math.isfinite(norm):
        raise NonFinite(job, "slope of the loss", rows, rows)
    limit = job.config.clip
    factor = limit / norm if limit is not None and norm > limit else 1.0
    clipped = {key: slope * factor for key, slope in slopes.items()}
    return Gradient(mean, norm, num_tokens(rows), begun.sizes[job.name].targets, clipped)

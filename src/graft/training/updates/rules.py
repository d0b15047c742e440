"""The rules by which a step comes from losses to an update, one file each: `gradients`, `in_backward`, `stack`, `zeroth`.

`train.method` says by its `rule` which one a job follows. Rules keep nothing between steps: what has to last is in the job's optimiser.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Protocol

from torch import Tensor

from graft.config.methods import Rule
from graft.training.batching import Batcher
from graft.training.forward.causal import Forward
from graft.training.job import Job
from graft.training.step import Gradient, Outcome
from graft.training.updates.gradients import Gradients
from graft.training.updates.in_backward import InBackward
from graft.training.updates.stack import Stack
from graft.training.updates.zeroth import Zeroth


class StepRule(Protocol):
    """What one step does. The engine calls `prepare` for jobs of one rule together, then `update` for each."""

    backward: ClassVar[bool]
    """Whether it runs a backward pass, and so holds activations."""

    def passes(self, job: Job) -> int:
        """How often every row of a step runs, a backward pass not counted."""
        ...

    def prepare(self, forward: Forward, jobs: Sequence[Job], batcher: Batcher) -> dict[str, Gradient]:
        """Run the passes of the next step of these jobs; what is known of each job's gradient, by name.

        Raises `NonFinite` for the first job with a loss or gradient that is not finite, and `GraftError` where parameters get no
        gradient. Parameters are then what they were, so the step can be taken again without that job; under `in_backward`, which has one
        job, those whose update came before a gradient that is not finite have changed.
        """
        ...

    def discard(self, jobs: Sequence[Job], loss: Tensor) -> None:
        """Run backward from a loss of these jobs, where the rule does, and leave no trace of it."""
        ...

    def rehearse(self, forward: Forward, job: Job, batcher: Batcher) -> None:
        """Run the passes of the job's next step, and leave no trace of them. Raises `NonFinite` as `prepare` does."""
        ...

    def update(self, job: Job, gradient: Gradient) -> Outcome:
        """Change the job's parameters by the gradient that `prepare` found, and move the job on."""
        ...


RULES: dict[Rule, StepRule] = {
    "gradients": Gradients(),
    "in_backward": InBackward(),
    "stack": Stack(),
    "zeroth": Zeroth(),
}


def rule_of(job: Job) -> StepRule:
    """Return the rule that a job follows."""
    return RULES[job.config.method.rule]


def by_rule(jobs: Sequence[Job]) -> list[list[Job]]:
    """Group jobs by their rules, in the order in which rules first occur: jobs of one rule share passes."""
    groups: dict[Rule, list[Job]] = {}
    for job in jobs:
        groups.setdefault(job.config.method.rule, []).append(job)
    return list(groups.values())

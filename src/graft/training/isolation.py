"""A joint step in which jobs do each other no harm: the job that fails is found and named, and the others take their step.

Nothing is changed until every job's gradient is there and finite. So a step that fails can be taken again without the job that caused
it. Where that job is not known, each job takes its step alone, which is the same step as together.
"""

from __future__ import annotations

from collections.abc import Sequence

from graft.training.batching import Batcher
from graft.training.forward.causal import Forward
from graft.training.job import Job
from graft.training.step import Gradient, NonFinite, Outcome
from graft.training.updates.rules import by_rule, rule_of
from graft.utils.clock import timed


@timed("step")
def joint_step(
    forward: Forward, jobs: Sequence[Job], batcher: Batcher
) -> tuple[dict[str, Outcome], dict[str, Exception]]:
    """One optimiser step of all jobs; the outcomes and the errors, by job. A job that fails is unchanged, unless its optimiser failed.

    Jobs of one rule (`updates/rules.py`) run together.

    For example, jobs a, b and c where b raises an error that names no job: the group [a b c] fails, so the groups [a], [b] and [c]
    follow; a and c take their step, and b's error is returned. Were b's loss not finite, the error would name b, and the group
    [a c] would follow.
    """
    outcomes: dict[str, Outcome] = {}
    failures: dict[str, Exception] = {}
    groups = by_rule(jobs)
    while groups:
        group = groups.pop(0)
        gradients, error = _try(forward, group, batcher)
        if gradients is not None:
            _update_each(group, gradients, outcomes, failures)
        elif isinstance(error, NonFinite):
            failures[error.job.name] = error
            groups.insert(0, [job for job in group if job is not error.job])
        elif error is not None and len(group) == 1:
            failures[group[0].name] = error
        else:
            groups += [[job] for job in group]
        groups = [group for group in groups if group]
    return outcomes, failures


def _try(
    forward: Forward, jobs: Sequence[Job], batcher: Batcher
) -> tuple[dict[str, Gradient] | None, Exception | None]:
    """The gradients of jobs of one rule, or the error.

    The error is returned, not raised, so that what its frames hold on the device is free for the next try.
    """
    try:
        return rule_of(jobs[0]).prepare(forward, jobs, batcher), None
    except Exception as error:
        # A traceback keeps those frames alive. It is kept only where the error is reported: there is no further try with this job.
        return None, error if len(jobs) == 1 or isinstance(error, NonFinite) else error.with_traceback(None)


def _update_each(
    jobs: Sequence[Job],
    gradients: dict[str, Gradient],
    outcomes: dict[str, Outcome],
    failures: dict[str, Exception],
) -> None:
    for job in jobs:
        try:
            outcomes[job.name] = rule_of(job).update(job, gradients[job.name])
        except Exception as error:
            failures[job.name] = error

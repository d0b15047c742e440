"""A step of jobs that do each other no harm: what goes wrong for one is found out, kept with its name, and the others take their step.

Until every job's gradient is there and finite, nothing is changed, so a step that fails can be taken again without the job whose fault
it is; where that is not known, job by job, which gives each the same step as in company.
"""

from __future__ import annotations

from collections.abc import Sequence

from graft.data.batches import Layout
from graft.training.forward.causal import Forward
from graft.training.job import Job
from graft.training.step import Gradients, NonFinite, Outcome, make_gradients, update
from graft.utils.clock import timed


@timed("step")
def joint_step(
    forward: Forward, jobs: Sequence[Job], budget: int, layout: Layout, pad_id: int
) -> tuple[dict[str, Outcome], dict[str, Exception]]:
    """One optimiser step of all jobs: what it gave, and what went wrong, by job. Of a job that fails nothing was changed,
    unless it was its optimiser that failed."""
    outcomes: dict[str, Outcome] = {}
    failures: dict[str, Exception] = {}
    groups: list[list[Job]] = [list(jobs)]
    while groups:
        group = groups.pop(0)
        found, failed = _gradients(forward, group, budget, layout, pad_id)
        if found is None and isinstance(failed, NonFinite):
            failures[failed.job.name] = failed
            groups.insert(0, [job for job in group if job is not failed.job])
        elif found is None and failed is not None:
            if len(group) == 1:
                failures[group[0].name] = failed
            else:
                groups += [[job] for job in group]
        elif found is not None:
            _update_all(group, found, outcomes, failures)
        groups = [each for each in groups if each]
    return outcomes, failures


def _gradients(
    forward: Forward, jobs: Sequence[Job], budget: int, layout: Layout, pad_id: int
) -> tuple[Gradients | None, Exception | None]:
    """The error is handed on, not raised, so that what its frames hold on the device is free before the next attempt."""
    try:
        return make_gradients(forward, jobs, budget, layout, pad_id), None
    except Exception as error:
        return None, error if len(jobs) == 1 or isinstance(error, NonFinite) else error.with_traceback(None)


def _update_all(
    jobs: Sequence[Job], gradients: Gradients, outcomes: dict[str, Outcome], failures: dict[str, Exception]
) -> None:
    for job in jobs:
        try:
            outcomes[job.name] = update(job, gradients)
        except Exception as error:
            failures[job.name] = error

"""A joint step in which jobs do each other no harm: the job that fails is found and named, and the others take their step.

Nothing is changed until every job's gradient is there and finite. So a step that fails can be taken again without the job that caused
it. Where that job is not known, each job takes its step alone, which is the same step as together.

The ranks of a run agree on what failed, and so go the same way. A rank that is lost is no job's failure.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from graft.distributed.failures import Elsewhere, RankLost, described
from graft.distributed.shares import Shares
from graft.training.batching import Batcher
from graft.training.forward.causal import Forward
from graft.training.job import Job
from graft.training.step import Gradient, NonFinite, Outcome, finished
from graft.training.updates.bank import update_banks
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
            _update_each(group, gradients, batcher.shares, outcomes, failures)
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
        gradients, error = rule_of(jobs[0]).prepare(forward, jobs, batcher), None
    except RankLost:
        raise
    except Exception as caught:
        # A traceback keeps those frames alive. It is kept only where the error is reported: there is no further try with this job.
        gradients, error = (
            None,
            caught if len(jobs) == 1 or isinstance(caught, NonFinite) else caught.with_traceback(None),
        )
    if batcher.shares.group.size > 1:
        gradients, error = _judged(batcher.shares, jobs, gradients, error)
    return gradients, error


def _judged(
    shares: Shares, jobs: Sequence[Job], gradients: dict[str, Gradient] | None, error: Exception | None
) -> tuple[dict[str, Gradient] | None, Exception | None]:
    """What all ranks make of a step: the first rank's error, or the gradients with the norms of jobs that live on other ranks."""
    group = shares.group
    norms = {} if gradients is None else {name: gradients[name].norm for name in shares.homes if name in gradients}
    known = torch.tensor([norms[name] if shares.here(name) else 0.0 for name in norms], dtype=torch.float64)
    if group.any(error is not None)[0]:
        said = group.gather(None if error is None else _verdict(error))
        first = next(rank for rank, each in enumerate(said) if each is not None)
        return None, error if error is not None and group.rank == first else _told(jobs, said[first] or {})
    if norms and gradients is not None:
        for name, norm in zip(norms, group.sum_(known).tolist(), strict=True):
            gradients[name] = replace(gradients[name], norm=norm)
    return gradients, None


def _verdict(error: Exception) -> dict[str, Any]:
    """An error as plain values, for the other ranks."""
    said, mistake = described(error)
    job, what = (error.job.name, error.what) if isinstance(error, NonFinite) else (None, None)
    return {"said": said, "mistake": mistake, "job": job, "what": what}


def _told(jobs: Sequence[Job], verdict: dict[str, Any]) -> Exception:
    """The error of another rank."""
    job = next((job for job in jobs if job.name == verdict["job"]), None)
    if job is None:
        return Elsewhere(verdict["said"], verdict["mistake"])
    rows = job.rows()
    error = NonFinite(job, verdict["what"], rows, rows)
    error.quiet = True
    return error


def _followed(job: Job, gradient: Gradient) -> Outcome:
    """Move a job on that took its update on another rank."""
    return finished(job, gradient, float(job.optimizer.param_groups[0]["lr"]))


def _update_each(
    jobs: Sequence[Job],
    gradients: dict[str, Gradient],
    shares: Shares,
    outcomes: dict[str, Outcome],
    failures: dict[str, Exception],
) -> None:
    own = update_banks(jobs)
    for job in (each for each in jobs if each.name not in own):
        try:
            if job.here:
                outcomes[job.name] = rule_of(job).update(job, gradients[job.name])
            else:
                outcomes[job.name] = _followed(job, gradients[job.name])
        except Exception as error:
            own[job.name] = error
    if shares.group.any(bool(own))[0]:
        for each in shares.group.gather({name: _verdict(error) for name, error in own.items()}):
            own = {**{name: _told((), verdict) for name, verdict in each.items()}, **own}
    for name, error in own.items():
        outcomes.pop(name, None)
        failures[name] = error

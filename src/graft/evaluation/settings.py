"""Refuse before training what `graft eval` would refuse after it: unknown tasks and protocols, missing libraries and files."""

from __future__ import annotations

from graft.config import AnyRun, EvalConfig
from graft.errors import GraftError, require
from graft.evaluation import protocols, tasks
from graft.evaluation.free_text import require_text_libraries
from graft.evaluation.scoring import require_libraries


def refuse_names(run: AnyRun) -> None:
    """Raise `GraftError` for tasks and protocols of a run's block `eval` that do not exist, or do not go together."""
    each = run.each()
    for name, job in each.items():
        try:
            _refuse(job.eval)
        except GraftError as error:
            raise GraftError(f"{f'job {name!r}: ' if len(each) > 1 else ''}eval: {error}") from error


def refuse_unusable(run: AnyRun) -> None:
    """Raise `GraftError` for what `refuse_names` refuses, for a library of a task that is not installed, and for files that are not there.

    Files on the hub are not looked up.
    """
    refuse_names(run)
    for job in run.each().values():
        if job.eval.metric == "text":
            require_text_libraries()
        for task in tasks.select(job.eval.tasks):
            require_libraries(task)
            if job.eval.protocol == "math-verify":
                require("math_verify", "eval")
            if job.eval.data is not None:
                task.load(job.eval.data)


def _refuse(settings: EvalConfig) -> None:
    if settings.protocol not in protocols.PROTOCOLS:
        protocols.get(settings.protocol, next(iter(tasks.TASKS.values())))  # raises with the nearest name
    for task in tasks.select(settings.tasks):
        protocols.get(settings.protocol, task)

"""Run the trials of one joint run to their end: train or resume, answer the test rows, read the outcome."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from graft.config import RunConfig
from graft.config.study import StudyConfig
from graft.errors import GraftError
from graft.evaluation.evaluating import evaluate_jobs, evaluate_tasks
from graft.evaluation.while_training import judge
from graft.generation.loaded import LoadedModel, load_candidates
from graft.runs.contents import is_run
from graft.runs.folder import RunFolder
from graft.study.grouping import joint_run
from graft.study.outcome import Outcome, outcomes
from graft.training import resume, train

BASE = "base"
"""The name of the bare base among the candidates of an evaluation."""


class Stopped(Exception):
    """The user stopped the training of a joint run; everything is saved."""


@dataclass(frozen=True)
class Pack:
    """A joint run of a study: its folder, and the run of each trial by the name of its job."""

    folder: Path
    configs: Mapping[str, RunConfig]
    alone_name: str | None = None
    """The trial's job where the run has no key `jobs`: the run then names its job itself."""


def run_pack(pack: Pack, config: StudyConfig, history: Any, with_base: bool, quiet: bool) -> dict[str, Outcome]:
    """Train the trials of a joint run, or go on where it was, and return their outcomes by job.

    with_base: whether the base answers the test rows too. Raises what the training raises if the run cannot begin, and `Stopped`.
    """
    run = RunFolder(pack.folder)
    if is_run(pack.folder):
        resume(run, quiet=quiet, judge=judge)
    else:
        train(joint_run(pack.configs, config.pruner, config.memory, history), pack.folder, quiet=quiet, judge=judge)
    if run.read_status().get("state") == "stopped":
        raise Stopped
    names = {job: job if pack.alone_name is None else pack.alone_name for job in pack.configs}
    found = outcomes(run, list(names.values()))
    done = [job for job in names if found[names[job]][0] == "done"]
    scores = _evaluate(run, config, [names[job] for job in done], with_base) if done else {}
    kept: dict[str, Outcome] = {}
    for job, name in names.items():
        state, result, error = found[name]
        kept[job] = (state, None if result is None else {**result, **scores.get(name, {}), "job": name}, error)
    if BASE in scores:
        kept[BASE] = ("done", scores[BASE], None)
    shutil.rmtree(pack.folder / "checkpoints", ignore_errors=True)  # nothing goes on from here
    return kept


def _evaluate(run: RunFolder, config: StudyConfig, names: Sequence[str], with_base: bool) -> dict[str, dict[str, Any]]:
    """Let trials answer the test rows and the benchmarks of the run; scores by candidate."""
    jobs = run.jobs()
    tasks = list(dict.fromkeys(task for job in jobs.values() for task in job.eval.tasks))
    if config.test is None and config.unrelated is None and not tasks:
        return {}
    loaded = load_candidates(run)
    wanted = {*names, *([BASE] if with_base else [])}
    loaded = replace(loaded, candidates=tuple(each for each in loaded.candidates if each.name in wanted))
    found: dict[str, dict[str, Any]] = {name: {} for name in wanted}
    place = run.path / "eval"
    if config.test is not None:
        for result in evaluate_jobs(loaded, config.test, place):
            _note(found, result, "test")
    if config.unrelated is not None:
        for name, loss in _losses(loaded, config.unrelated).items():
            found[name]["unrelated_loss"] = loss
    for part in loaded.split_jobs(lambda job: job.eval):
        settings = part.config.eval if part.config is not None else None
        if settings is not None and settings.tasks:
            for result in evaluate_tasks(
                part, settings.tasks, settings.protocol, settings.data, place, settings=settings
            )["tasks"]:
                _note(found, result, result["task"])
    return found


def _note(found: dict[str, dict[str, Any]], result: Mapping[str, Any], name: str) -> None:
    """Note the scores of one evaluation: test_accuracy and test_loss of the test rows, the accuracy of a benchmark under its name."""
    for each in result["results"]:
        own = found.get(each["name"])
        if own is None:
            continue
        accuracy = each.get("accuracy")
        if name == "test":
            own |= {"test_accuracy": accuracy, "test_loss": each.get("loss"), "test_answers": result["folder"]}
        else:
            own |= {name: accuracy, f"{name}_answers": result["folder"]}


def _losses(loaded: LoadedModel, file: str) -> dict[str, float]:
    """The loss per token of each candidate on a file of text."""
    from graft.study.forgetting import losses_on

    return losses_on(loaded, file)


def unusual(error: BaseException) -> bool:
    """Whether an error ends the study, instead of a trial: the disk is full, the user stopped, the process runs out of its limits."""
    return isinstance(error, KeyboardInterrupt | SystemExit | Stopped) or (
        isinstance(error, GraftError) and isinstance(error.__cause__, OSError)
    )

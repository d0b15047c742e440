"""From a run folder (or a base with adapters) and a data file or benchmarks to results: what `graft eval` and `Run.eval` call."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

from graft.config.data import SourceConfig
from graft.config.eval import EvalConfig
from graft.config.run import RunConfig
from graft.data.file_readers import rows_of
from graft.data.labelling import LABELLED
from graft.data.overlap import questions_of
from graft.data.preparing import samples_of, validation_source
from graft.data.reading import local_files, read, read_as_found
from graft.data.samples import Sample
from graft.errors import GraftError
from graft.evaluation import protocols, tasks
from graft.evaluation.answering import Progress, folder_of
from graft.evaluation.benchmark import evaluate_task
from graft.evaluation.datafile import evaluate_data_file, evaluation_of, protocol_hash
from graft.evaluation.labels import evaluate_labels
from graft.evaluation.limits import Limits
from graft.evaluation.overlaps import known_overlaps
from graft.evaluation.preferences import evaluate_preferences
from graft.evaluation.questions import asked_by
from graft.evaluation.tables import averages
from graft.evaluation.tasks import Task
from graft.generation.loaded import LoadedModel, load_candidates
from graft.runs.folder import RunFolder

WORKED = ("output", "completion", "response")
"""Columns that hold a worked answer where `answer` holds its result, as in the files of LLM-Adapters."""


def evaluate(run: RunFolder | str | Path, data: str | Path | None = None, **options: Any) -> dict[str, Any]:
    """Loss and accuracy of a run's base and adapters on a data file, or on the run's own validation data.

    Written to eval/<task>.<protocol hash>/ in the run folder; the return value is what result.json holds, or, where jobs were
    trained on different data, {"evaluations": a list of these}. options: as `evaluate_on` takes them.
    """
    folder = (run if isinstance(run, RunFolder) else RunFolder(run)).existing()
    found = evaluate_jobs(load_candidates(folder), data, folder.path / "eval", **options)
    return found[0] if len(found) == 1 else {"evaluations": found}


def evaluate_jobs(
    loaded: LoadedModel, data: str | Path | SourceConfig | None, out: Path | None, **options: Any
) -> list[dict[str, Any]]:
    """`evaluate_on` for a run of several jobs: one evaluation for each of the data sets and ways that they were trained with."""

    def key(own: RunConfig) -> Any:
        return own.data.train_on, own.eval, own.data if data is None else None

    return [evaluate_on(part, data, out, **options) for part in loaded.split_jobs(key)]


def evaluate_on(
    loaded: LoadedModel,
    data: str | Path | SourceConfig | None,
    out: Path | None,
    *,
    settings: EvalConfig | None = None,
    beams: int = 1,
    progress: Progress | None = None,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Evaluate a bench on a data file and keep the result in a folder of its own below `out` (None: nowhere).

    An evaluation that was interrupted there goes on; overwrite: it begins anew.
    """
    config = loaded.config
    settings = settings or (config.eval if config is not None else EvalConfig())
    task, samples, golds = _rows(loaded, data, settings.limit)
    if loaded.base.task in LABELLED:
        if beams > 1:
            raise GraftError(f"beams search for texts; the base is loaded for {loaded.base.task}")
        return evaluate_labels(
            loaded, task, samples[: settings.limit], out, token_budget=settings.token_budget, progress=progress,
            overwrite=overwrite, limit=settings.limit,
            overlap=known_overlaps(loaded, {task: questions_of(samples[: settings.limit])})[task],
        )  # fmt: skip
    if samples[0].rejected:
        if beams > 1:
            raise GraftError(
                f"beams search for texts; {task} holds pairs of answers, which are compared by their likelihood"
            )
        return evaluate_preferences(
            loaded, task, samples[: settings.limit], out, token_budget=settings.token_budget, overwrite=overwrite,
            limit=settings.limit, overlap=known_overlaps(loaded, {task: questions_of(samples[: settings.limit])})[task],
        )  # fmt: skip
    train_on = config.data.train_on if config is not None else "completion"
    evaluation = evaluation_of(task, samples, settings, golds, train_on=train_on, beams=beams)
    folder = folder_of(out, task, protocol_hash(evaluation, loaded.candidates))
    overlap = known_overlaps(loaded, {task: questions_of(evaluation.samples)})[task]
    return evaluate_data_file(
        loaded, evaluation, folder, progress, overwrite=overwrite, limit=settings.limit, overlap=overlap
    )


Bars = Callable[[str], AbstractContextManager[Progress | None]]
"""A progress bar by its title."""


def evaluate_tasks(
    loaded: LoadedModel,
    names: str | Iterable[str],
    protocol: str,
    data: str | Path | None,
    out: Path | None,
    *,
    settings: EvalConfig | None = None,
    limits: Limits | None = None,
    overwrite: bool = False,
    bars: Bars | None = None,
    each: Callable[[dict[str, Any]], None] | None = None,
) -> dict[str, Any]:
    """Evaluate a bench on benchmarks (names of tasks and groups) under one protocol, task by task.

    data: the folder of their files, a file of the only task, or None for the hub. settings: limit and token_budget. limits: in
    place of its limit, where tasks have limits of their own. bars and each: what to show during a task, and what to do with its result.
    Returns the results, the tasks of a group whose files the folder does not hold, and the averages over tasks.
    Raises `GraftError` before anything is asked: for unknown names, for a protocol that a task does not define, for a task
    that is named itself and whose file is not there, for a limit of a task that is not asked, and for a row without an answer.
    """
    settings = settings or EvalConfig()
    limits = limits or Limits(settings.limit)
    wanted = [name.strip() for name in (names.split(",") if isinstance(names, str) else names)]
    limits.check(tasks.select(wanted))
    chosen, absent = _present(wanted, data)
    rules = [protocols.get(protocol, task) for task in chosen]
    samples = [task.load(data, limits.of(task)) for task in chosen]
    overlaps = known_overlaps(loaded, {task.name: asked_by(own) for task, own in zip(chosen, samples, strict=True)})
    results = []
    for number, (task, rule, records) in enumerate(zip(chosen, rules, samples, strict=True), start=1):
        with bars(f"{task.name} ({number} of {len(chosen)})") if bars is not None else nullcontext() as progress:
            result = evaluate_task(
                loaded, task, rule, records, out, token_budget=settings.token_budget, progress=progress,
                overwrite=overwrite, limit=limits.of(task), overlap=overlaps[task.name],
            )  # fmt: skip
        results.append(result)
        if each is not None:
            each(result)
    return {"protocol": protocol, "tasks": results, "absent": absent, "averages": averages(results)}


def _present(names: Sequence[str], data: str | Path | None) -> tuple[list[Task], list[dict[str, str]]]:
    """The tasks to evaluate, and those of groups that the folder does not hold, with what was looked for."""
    chosen = tasks.select(names)
    folder = None if data is None else Path(data).expanduser()
    if folder is None or folder.is_file():
        if folder is not None and len(chosen) > 1:
            raise GraftError(
                f"{data} is one file, but {len(chosen)} tasks are named: give the folder that holds their files"
            )
        return chosen, []
    if not folder.is_dir():
        raise GraftError(f"there is no folder {data} with the files of {', '.join(task.name for task in chosen)}")
    of_groups = {task.name for task in tasks.select([name for name in names if name in tasks.GROUPS])}
    missing = [task for task in chosen if task.find(folder) is None]
    for task in missing:
        if task.name not in of_groups or len(missing) == len(chosen):
            task.load(folder)  # says what was looked for
    absent = [{"task": task.name, "reason": f"{folder} holds none of {', '.join(task.places)}"} for task in missing]
    return [task for task in chosen if task not in missing], absent


def _rows(
    loaded: LoadedModel, data: str | Path | SourceConfig | None, limit: int | None
) -> tuple[str, list[Sample], list[str] | None]:
    """The task's name, its rows, and the right answers where the file has them apart."""
    config = loaded.config
    if data is not None:
        source = data if isinstance(data, SourceConfig) else SourceConfig(path=str(data), limit=limit)
    elif config is None:
        raise GraftError("name the data to evaluate on: --data FILE")
    else:
        source = validation_source(config.data)
    if source is not None:
        causal = loaded.base.task == "causal"
        samples, pairs = read_as_found(source) if causal else (read(source, task=loaded.base.task), False)
        own = loaded.base.task in LABELLED or pairs
        return Path(source.path).stem, samples, None if own else _golds(source, samples)
    assert config is not None
    _, held_out = samples_of(config.data)
    if not held_out:
        raise GraftError("this run has no validation data: name the data to evaluate on with --data FILE")
    return "validation", held_out, None


def _golds(source: SourceConfig, samples: Sequence[Sample]) -> list[str] | None:
    """The column `answer` of files that have one beside a worked answer (`output`, `completion`, `response`); else None."""
    files = local_files(source)
    tables = {str(file): rows_of(file) for file in files} if files is not None else {}
    rows = [tables[sample.source][sample.row - 1] for sample in samples if sample.source in tables]
    if not rows or not any("answer" in row and any(name in row for name in WORKED) for row in rows):
        return None
    for sample, row in zip(samples, rows, strict=True):
        if row.get("answer") is None:
            raise GraftError(f"{sample.where}, field 'answer': is missing, though other rows have it")
    return [str(row["answer"]) for row in rows]

"""The entry points of evaluation, which `graft eval` and `Run.eval` call: load the data, evaluate, return the results."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

from graft.config.data import GivenSource, SourceConfig
from graft.config.eval import EvalConfig
from graft.config.run import RunConfig
from graft.data.file_readers import read_rows
from graft.data.folders import local_files
from graft.data.labelling import LABELLED
from graft.data.overlap import questions_of
from graft.data.reading import read, read_as_found, text_format
from graft.data.samples import Sample
from graft.data.splits import samples_of, train_sources, validation_source
from graft.errors import GraftError
from graft.evaluation import protocols, tasks
from graft.evaluation.answering import Progress, result_folder
from graft.evaluation.benchmark import evaluate_task
from graft.evaluation.datafile import evaluate_data_file, make_evaluation
from graft.evaluation.labelled_tasks import fitted, labelled_rows
from graft.evaluation.labels import evaluate_labels
from graft.evaluation.limits import Limits
from graft.evaluation.overlaps import known_overlaps, questions_of_records
from graft.evaluation.preferences import evaluate_preferences
from graft.evaluation.tables import average_intervals, averages
from graft.evaluation.tasks import Task
from graft.generation.loaded import LoadedModel, load_candidates
from graft.runs.folder import RunFolder

WORKED_COLUMNS = ("output", "completion", "response")
"""Columns that hold a worked answer if `answer` holds only its result, as in the files of LLM-Adapters."""


def evaluate(run: RunFolder | str | Path, data: str | Path | None = None, **options: Any) -> dict[str, Any]:
    """Evaluate the base and the adapters of a run on a data file, or on the run's own validation data.

    Results are written to eval/<task>.<protocol hash>/ in the run folder. Returns the content of result.json or, if jobs with
    different data were evaluated separately, {"evaluations": [one per group of jobs]}. options: those of `evaluate_on`.
    """
    folder = (run if isinstance(run, RunFolder) else RunFolder(run)).existing()
    found = evaluate_jobs(load_candidates(folder), data, folder.path / "eval", **options)
    return found[0] if len(found) == 1 else {"evaluations": found}


def evaluate_jobs(
    loaded: LoadedModel, data: str | Path | SourceConfig | None, out: Path | None, **options: Any
) -> list[dict[str, Any]]:
    """Evaluate a run of several jobs: jobs that were trained with the same data and settings are evaluated together.

    Returns one result per such group. options: those of `evaluate_on`.
    """

    def key(job: RunConfig) -> Any:
        return job.data.train_on, job.eval, job.data if data is None else None

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
    """Evaluate a loaded model on a data file and write the result to a folder of its own in `out` (None: nowhere).

    The kind of evaluation follows from the base's task and the data: labels, pairs of answers, or generated answers.
    data: None is the run's validation data. overwrite: discard the answers of an interrupted evaluation instead of continuing.
    Raises `GraftError` for data that cannot be read, and for beams where no text is generated.
    """
    config = loaded.config
    settings = settings or (config.eval if config is not None else EvalConfig())
    task, samples, golds = _rows(loaded, data, settings.limit)
    samples = samples[: settings.limit]
    if samples[0].desirable is not None:
        raise GraftError(
            f"{task} holds answers that are marked good or bad one by one; graft eval compares pairs, or answers to questions: name such "
            "data with --data (the run's metrics.jsonl has the scores of kto)"
        )
    has_labels, has_pairs = loaded.base.task in LABELLED, bool(samples[0].rejected)
    if beams > 1 and (has_labels or has_pairs):
        what = f"a base for {loaded.base.task}" if has_labels else f"{task}, which holds pairs of answers"
        raise GraftError(f"beams have no effect on {what}, because no text is generated: leave them out")

    facts = {
        "limit": settings.limit,
        "overlap": known_overlaps(loaded, {task: questions_of(samples)})[task],
    }
    if has_labels:
        return evaluate_labels(
            loaded, task, samples, out,
            token_budget=settings.token_budget, progress=progress, overwrite=overwrite, **facts,
        )  # fmt: skip
    if has_pairs:
        return evaluate_preferences(
            loaded, task, samples, out, token_budget=settings.token_budget, overwrite=overwrite, **facts
        )
    train_on = config.data.train_on if config is not None else "completion"
    evaluation = make_evaluation(task, samples, settings, golds, train_on=train_on, beams=beams)
    folder = result_folder(out, task, evaluation.digest(loaded.candidates))
    return evaluate_data_file(loaded, evaluation, folder, progress, overwrite=overwrite, **facts)


Bars = Callable[[str], AbstractContextManager[Progress | None]]
"""Opens a progress bar with the given title."""


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
    """Evaluate a loaded model on benchmarks (names of tasks and groups) under one protocol, task by task.

    data: the folder of the benchmarks' files, a file if there is only one task, or None for the hub. settings: its limit and
    token_budget are used. limits: replace that limit, if tasks have limits of their own. bars: opens the progress bar of a
    task. each: called with every result. Adapters that label texts are evaluated on the labels of the rows, without a protocol.
    Returns the results, the tasks of groups that the folder does not hold, and the averages over tasks.
    Raises `GraftError` before any question is asked: for unknown names, for a protocol that is not defined for a task, for a
    task that was named itself but has no file, for a limit of a task that is not evaluated, and for a row without an answer.
    """
    settings = settings or EvalConfig()
    limits = limits or Limits(settings.limit)
    wanted = [name.strip() for name in (names.split(",") if isinstance(names, str) else names)]
    limits.check(tasks.select(wanted))
    # Load everything first, so that a mistake in the last task does not show after hours of evaluation.
    chosen, absent = _available_tasks(wanted, data)
    if loaded.base.task in LABELLED:
        found, left = _labelled(loaded, chosen, data, out, settings.token_budget, limits, overwrite, bars, each)
        return _summary(str(loaded.base.task), found, [*absent, *left])
    rules = [protocols.get(protocol, task) for task in chosen]
    samples = [task.load(data, limits.of(task)) for task in chosen]
    overlaps = known_overlaps(
        loaded, {task.name: questions_of_records(own) for task, own in zip(chosen, samples, strict=True)}
    )
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
    return _summary(protocol, results, absent)


def _summary(protocol: str, results: list[dict[str, Any]], absent: list[dict[str, str]]) -> dict[str, Any]:
    return {
        "protocol": protocol,
        "tasks": results,
        "absent": absent,
        "averages": averages(results),
        "average_intervals": average_intervals(results),
    }


def _labelled(
    loaded: LoadedModel,
    chosen: Sequence[Task],
    data: str | Path | None,
    out: Path | None,
    token_budget: int,
    limits: Limits,
    overwrite: bool,
    bars: Bars | None,
    each: Callable[[dict[str, Any]], None] | None,
) -> tuple[list[dict[str, Any]], list[dict[str, str]]]:
    """Evaluate adapters that label texts. Returns the results, and which adapters have other classes than a task."""
    kind = str(loaded.base.task)
    read = [fitted(loaded, task, labelled_rows(task, kind, data, limits.of(task))) for task in chosen]
    results, left = [], []
    for number, (task, (own, samples, others)) in enumerate(zip(chosen, read, strict=True), start=1):
        left += [{"task": task.name, "reason": f"{name} was trained with other classes"} for name in others]
        overlap = known_overlaps(own, {task.name: questions_of(samples)})[task.name]
        with bars(f"{task.name} ({number} of {len(chosen)})") if bars is not None else nullcontext() as progress:
            result = evaluate_labels(
                own, task.name, samples, out, token_budget=token_budget, progress=progress, overwrite=overwrite,
                limit=limits.of(task), overlap=overlap,
            )  # fmt: skip
        results.append(result)
        if each is not None:
            each(result)
    return results, left


def _available_tasks(names: Sequence[str], data: str | Path | None) -> tuple[list[Task], list[dict[str, str]]]:
    """Return the tasks to evaluate, and the tasks of groups that the folder does not hold, with the reason.

    A task that was named itself has to be there; a missing member of a group is only reported.
    """
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
            task.load(folder)  # raises an error that says which files were looked for
    absent = [{"task": task.name, "reason": f"{folder} holds none of {', '.join(task.places)}"} for task in missing]
    return [task for task in chosen if task not in missing], absent


def _rows(
    loaded: LoadedModel, data: str | Path | SourceConfig | None, limit: int | None
) -> tuple[str, list[Sample], list[str] | None]:
    """Return the name of the data, its rows, and the right answers if the file has a column of its own for them."""
    config = loaded.config
    if data is not None:
        source = data if isinstance(data, SourceConfig) else given_source(data, config, limit=limit)
    elif config is None:
        raise GraftError("name the data to evaluate on: --data FILE")
    else:
        source = validation_source(config.data)
    if source is not None:
        causal = loaded.base.task == "causal"
        samples, pairs = read_as_found(source) if causal else (read(source, task=loaded.base.task), False)
        own = loaded.base.task in LABELLED or pairs
        return Path(source.path).stem, samples, None if own else _gold_answers(source, samples)
    assert config is not None
    _, held_out = samples_of(config.data)
    if not held_out:
        raise GraftError("this run has no validation data: name the data to evaluate on with --data FILE")
    return "validation", held_out, None


def given_source(
    path: str | Path, run: RunConfig | None, fields: Mapping[str, str] | None = None, limit: int | None = None
) -> GivenSource:
    """Return data that are named on the command line, read with the `fields` and `ignore` of the run's own training data.

    fields: further columns to rename, which the data must have.
    """
    own = [] if run is None else train_sources(run.data)
    renamed = {ours: theirs for source in own for ours, theirs in source.fields.items()}
    ignored = [column for source in own for column in source.ignore]
    given = {"path": str(path), "limit": limit, "fields": dict(fields or {})}
    return GivenSource.model_validate({**given, "own_fields": renamed, "ignore": ignored})


def _gold_answers(source: SourceConfig, samples: Sequence[Sample]) -> list[str] | None:
    """Return the column `answer` of files that also have a worked answer (see WORKED_COLUMNS); None for other files."""
    files = local_files(source)
    tables = {str(file): read_rows(file, text_format(source)) for file in files} if files is not None else {}
    rows = [tables[sample.source][sample.row - 1] for sample in samples if sample.source in tables]
    if not rows or not any("answer" in row and any(name in row for name in WORKED_COLUMNS) for row in rows):
        return None
    for sample, row in zip(samples, rows, strict=True):
        if row.get("answer") is None:
            raise GraftError(f"{sample.where}, field 'answer': is missing, although other rows have it")
    return [str(row["answer"]) for row in rows]

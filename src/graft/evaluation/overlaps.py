"""Find the questions of test sets in training data: a score on questions that an adapter has seen measures its memory.

The training data of an adapter are known if its folder lies in the run that trained it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from graft.config.data import DataConfig, GivenSource
from graft.data.file_readers import file_type
from graft.data.overlap import Question, overlap_reports, questions_of
from graft.data.preparing import samples_of
from graft.data.reading import read
from graft.errors import GraftError
from graft.evaluation.tasks import select
from graft.evaluation.tasks.base import Record
from graft.generation.loaded import LoadedModel


def questions_against(names: Iterable[str], data: str | Path | None = None) -> dict[str, list[Question]]:
    """Read test sets by name: files, tasks and groups of tasks. Returns name of the file or task -> its questions.

    data: the folder that holds the tasks' files; None: the hub. Raises `GraftError` for a file that is missing or
    unreadable, for an unknown task with the nearest name, and for a folder without the task's file.
    """
    found = {}
    for name in names:
        if Path(name).is_file() or file_type(Path(name)) is not None:
            found[name] = questions_of(read(GivenSource(path=name, option=None), need_answers=False))
        else:
            found |= {task.name: questions_of_records(task.load(data)) for task in select(name)}
    return found


def questions_of_records(records: Iterable[Record]) -> list[Question]:
    """Return the questions of a task as a model is asked them, with their listed choices."""
    return [Question(record.instruction, record.where) for record in records]


def known_overlaps(loaded: LoadedModel, tests: Mapping[str, Sequence[Question]]) -> dict[str, list[dict[str, Any]]]:
    """Report how many questions of each test set are in the known training data of the adapters.

    Returns test set -> one report per training set: `of` names the adapters that were trained on it; then follow the counts,
    or the reason why they are unknown.
    """
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in tests}
    for adapters, data in _trained_on(loaded):
        for name, report in _reports(data, tests).items():
            found[name].append({"of": adapters, **report})
    return found


def _trained_on(loaded: LoadedModel) -> list[tuple[list[str], DataConfig]]:
    """Return the training sets of the candidates, each with the names of those that share it."""
    found: dict[str, tuple[list[str], DataConfig]] = {}
    for candidate in loaded.candidates:  # the bare base was trained by no run
        if candidate.trained is not None:
            data = candidate.trained.data
            found.setdefault(data.model_dump_json(), ([], data))[0].append(candidate.name)
    return list(found.values())


def _reports(data: DataConfig, tests: Mapping[str, Sequence[Question]]) -> dict[str, dict[str, Any]]:
    try:
        trained = [sample for source in samples_of(data)[0] for sample in source]
    except GraftError as error:  # training data that are not on this machine must not prevent an evaluation
        return {name: {"unknown": str(error)} for name in tests}
    return {name: report.to_dict() for name, report in overlap_reports(trained, tests).items()}

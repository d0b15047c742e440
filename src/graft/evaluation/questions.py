"""The questions of test sets, by the names that a user gives: files, tasks and groups of tasks."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from graft.data.file_readers import KINDS
from graft.data.overlap import Question, questions_of
from graft.data.reading import read
from graft.evaluation.tasks import select
from graft.evaluation.tasks.base import Record


def questions_against(names: Iterable[str], data: str | Path | None = None) -> dict[str, list[Question]]:
    """Test set (a file as it was given, or a task's name) -> what it asks.

    data: the folder that holds the tasks' files; None: the hub. Raises `GraftError` for a file that is missing or
    unreadable, for an unknown task with the nearest name, and for a folder without the task's file.
    """
    found = {}
    for name in names:
        if Path(name).is_file() or Path(name).suffix.lower() in KINDS:
            found[name] = questions_of(read(name, need_answers=False))
        else:
            found |= {task.name: asked_by(task.load(data)) for task in select(name)}
    return found


def asked_by(records: Iterable[Record]) -> list[Question]:
    """The questions of a task's records, as a model is asked them, listed choices included."""
    return [Question(record.instruction, record.where) for record in records]

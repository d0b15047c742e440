"""Limits on the number of questions per task, as `--limit` takes them: one for all tasks, and others for named tasks.

    100              the first 100 questions of each task
    100,addsub=all   all questions of AddSub, and the first 100 of every other task
    commonsense=50   the first 50 questions of each task of that group, and all of the others

A later part overrides an earlier one, so a group can be followed by its exceptions.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from graft.errors import GraftError
from graft.evaluation import tasks
from graft.evaluation.tasks import Task

_ALLOWED = "a number of rows from 1, or 'all', for every task, nor TASK=ROWS for one task, as in --limit 100,addsub=all"


@dataclass(frozen=True)
class Limits:
    """How many rows of each task are used, from its start; None is all."""

    default: int | None = None
    named: Mapping[str, int | None] = field(default_factory=dict)
    """The limits of tasks that have their own."""

    @classmethod
    def parse(cls, text: str, default: int | None = None) -> Limits:
        """Read the value of --limit. default: limit of the tasks that the text does not cover.

        Raises `GraftError` for an invalid number of rows, for an unknown task (with the nearest name), and for a task that is
        named twice.
        """
        named: dict[str, int | None] = {}
        seen: set[str] = set()
        for part in (part.strip() for part in text.split(",")):
            name, equals, number = (each.strip() for each in part.rpartition("="))
            limit = _rows(number, text, part)
            if equals and not name:
                raise GraftError(_wrong(text, part))
            if name in seen:
                raise GraftError(f"--limit {text}: the limit of {name or 'every task'} is given twice")
            seen.add(name)
            if equals:
                named |= {task.name: limit for task in tasks.select(name)}
            else:
                default = limit
        return cls(default, named)

    def of(self, task: Task) -> int | None:
        """Return the limit of one task."""
        return self.named.get(task.name, self.default)

    def check(self, asked: Iterable[Task]) -> None:
        """Raise `GraftError` for a limit of a task that is not evaluated, because it would have no effect."""
        names = [task.name for task in asked]
        stray = next((name for name in self.named if name not in names), None)
        if stray is not None:
            raise GraftError(
                f"a limit is given for '{stray}', which is not evaluated; the tasks are {', '.join(names)}"
            )

    def plain(self, what: str) -> int | None:
        """Return the one limit. Raises `GraftError` if tasks are named, since `what` (used in the message) has no tasks."""
        if self.named:
            raise GraftError(f"limits for single tasks are for --tasks; {what} takes one number: --limit 100")
        return self.default


def _rows(number: str, text: str, part: str) -> int | None:
    if number == "all":
        return None
    if not number.isdecimal() or int(number) < 1:
        raise GraftError(_wrong(text, part))
    return int(number)


def _wrong(text: str, part: str) -> str:
    return f"--limit {text}: {part!r} is not {_ALLOWED}"

"""How many questions of each task are asked: one number for all, and others for tasks that are named.

    100              the first 100 of each
    100,addsub=all   of AddSub all, of every other task the first 100
    commonsense=50   of the tasks of that group the first 50, of others all

What stands later holds, so that a group can be named before its exceptions.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from graft.errors import GraftError
from graft.evaluation import tasks
from graft.evaluation.tasks import Task

_ALLOWED = "a number of rows from 1, or 'all', for every task; TASK=NUMBER or TASK=all for one: --limit 100,addsub=all"


@dataclass(frozen=True)
class Limits:
    """Rows from the start of each task; None is all."""

    default: int | None = None
    named: Mapping[str, int | None] = field(default_factory=dict)
    """Of tasks that have a limit of their own."""

    @classmethod
    def parse(cls, text: str, default: int | None = None) -> Limits:
        """default: of tasks that the text does not speak of.

        Raises `GraftError` for what is no number of rows, for an unknown task with the nearest name, and for one named twice.
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
        """Rows of one task."""
        return self.named.get(task.name, self.default)

    def check(self, asked: Iterable[Task]) -> None:
        """Raises `GraftError` for a limit of a task that is not asked: it would have no effect."""
        names = [task.name for task in asked]
        stray = next((name for name in self.named if name not in names), None)
        if stray is not None:
            raise GraftError(f"a limit is given for '{stray}', which is not asked: {', '.join(names)}")

    def plain(self, what: str) -> int | None:
        """The one number. Raises `GraftError` where tasks are named: `what` has none."""
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

"""The benchmarks: one file each, with a raw example at its top. The registry below is the only list of them.

The names are those of the folders of LLM-Adapters. Lookups ignore case, dashes, underscores and spaces.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from graft.errors import GraftError, nearest
from graft.evaluation.tasks import (
    addsub,
    aqua,
    arc,
    boolq,
    classification,
    e2e,
    gsm8k,
    hellaswag,
    mathqa,
    mawps,
    multiarith,
    openbookqa,
    piqa,
    singleeq,
    social_i_qa,
    svamp,
    winogrande,
)
from graft.evaluation.tasks.base import Record, Task

_ARITHMETIC = (
    addsub.TASK, aqua.TASK, gsm8k.TASK, multiarith.TASK, singleeq.TASK, svamp.TASK, mawps.TASK, mathqa.TASK,
)  # fmt: skip
_COMMONSENSE = (
    boolq.TASK, piqa.TASK, social_i_qa.TASK, hellaswag.TASK, winogrande.TASK, arc.EASY, arc.CHALLENGE, openbookqa.TASK,
)  # fmt: skip
_OTHERS = (e2e.TASK, *classification.GLUE, classification.ANY)

TASKS: dict[str, Task] = {task.name: task for task in (*_ARITHMETIC, *_COMMONSENSE, *_OTHERS)}
GROUPS: dict[str, tuple[str, ...]] = {
    "arithmetic": tuple(task.name for task in _ARITHMETIC),
    "arithmetic-4": ("gsm8k", "AQuA", "mawps", "SVAMP"),  # the README's table
    "arithmetic-6": ("MultiArith", "gsm8k", "AddSub", "AQuA", "SingleEq", "SVAMP"),  # the paper's table
    "commonsense": tuple(task.name for task in _COMMONSENSE),
    "glue": tuple(task.name for task in classification.GLUE),
    "all": tuple(task.name for task in (*_ARITHMETIC, *_COMMONSENSE)),
}
"""Names for several tasks. Half of arithmetic-6 is contaminated: LLM-Adapters trains on MAWPS, which holds near-copies."""

_ALSO = {"siqa": "social_i_qa", "obqa": "openbookqa"}

__all__ = ["GROUPS", "TASKS", "Record", "Task", "get", "select"]


def get(name: str) -> Task:
    """Return a task by name. Raises `GraftError` with the nearest name for an unknown one."""
    plain = {_plain(known): task for known, task in TASKS.items()}
    plain |= {other: TASKS[known] for other, known in _ALSO.items()}
    if _plain(name) not in plain:
        raise GraftError(f"unknown task '{name}'.{_nearest(name, TASKS)} The tasks are: {', '.join(TASKS)}")
    return plain[_plain(name)]


def select(names: str | Iterable[str]) -> list[Task]:
    """Return tasks by the names of tasks and groups ("arithmetic,boolq"), each once, in the given order.

    Raises `GraftError` with the nearest name for an unknown one.
    """
    wanted = names.split(",") if isinstance(names, str) else names
    found: dict[str, Task] = {}
    for name in (name.strip() for name in wanted):
        if name not in GROUPS and _plain(name) not in {_plain(known) for known in (*TASKS, *_ALSO)}:
            known = (*GROUPS, *TASKS)
            raise GraftError(
                f"unknown task or group '{name}'.{_nearest(name, known)} The groups and tasks are: {', '.join(known)}"
            )
        for each in GROUPS.get(name) or (name,):
            task = get(each)
            found[task.name] = task
    return list(found.values())


def _plain(name: str) -> str:
    return re.sub(r"[-_ ]", "", name).casefold()


def _nearest(name: str, known: Iterable[str]) -> str:
    """Suggest the nearest known name, ignoring case."""
    plain = {each.casefold(): each for each in known}
    found = nearest(name.casefold(), plain)
    return f" Did you mean '{plain[found]}'?" if found else ""

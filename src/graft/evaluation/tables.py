"""Results side by side: one table per protocol, a row per task, a column per contestant, and the average below.

The average is the unweighted mean over tasks, as tables in papers have it, however many questions a task has. Scores of
different protocols never share a column: a table holds results of one protocol only.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from graft.evaluation.journal import ANSWERS, RESULT, read_result

SCORES = {"accuracy": "accuracy", "bleu": "BLEU", "pearson": "Pearson"}
"""What stands for a contestant in a table, and its name there; the first that a result has."""

Result = Mapping[str, Any]


@dataclass(frozen=True)
class Side:
    """One table: results of one protocol."""

    protocol: str
    results: tuple[Result, ...]

    @property
    def candidates(self) -> list[str]:
        return list(dict.fromkeys(each["name"] for result in self.results for each in result["results"]))

    def rows(self) -> list[list[Any]]:
        """Task, number of questions, a score per contestant; the average last where several tasks have an accuracy.

        Where lm-eval was asked, a row for each of a task's metrics, in lm-eval's digits; averages are of the first.
        """
        found = [row for result in self.results for row in _rows(result, self.candidates)]
        means = averages(self.results)
        most = max((mean["tasks"] for mean in means.values()), default=0)
        if most > 1:
            cells = [f"{means[name]['accuracy']:.1%}" if name in means else None for name in self.candidates]
            found.append([f"average of {most} tasks", None, *cells])
        return found


def averages(results: Sequence[Result]) -> dict[str, dict[str, Any]]:
    """Contestant -> mean accuracy over the tasks that have one, each task counting once; and how many tasks those are."""
    found: dict[str, list[float]] = {}
    for result in results:
        for each in result["results"]:
            if "accuracy" in each:
                found.setdefault(each["name"], []).append(each["accuracy"])
    most = max(map(len, found.values()), default=0)
    # The mean over fewer tasks than another contestant's would stand beside that one's as if it were comparable.
    return {name: {"accuracy": sum(a) / len(a), "tasks": len(a)} for name, a in found.items() if len(a) == most}


def sides(results: Sequence[Result]) -> list[Side]:
    """Sort results into tables: by protocol; results of one task with different hashes go to different tables."""
    tables: list[list[Result]] = []
    for result in results:
        place = next((table for table in tables if _together(table, result)), None)
        if place is None:
            tables.append([result])
        else:
            place.append(result)
    return [Side(_protocol(table[0]), tuple(table)) for table in tables]


def saved(folder: Path) -> list[Result]:
    """The results in a folder of results, or in the folder of one, in the order in which they were written."""
    files = sorted(_in(folder, RESULT), key=lambda path: (path.stat().st_mtime, path))
    return [{**read_result(path.parent), "folder": str(path.parent)} for path in files]


def unfinished(folder: Path) -> list[Path]:
    """The folders in which answers wait for their evaluation to go on."""
    return sorted(path.parent for path in _in(folder, ANSWERS) if not (path.parent / RESULT).is_file())


def _in(folder: Path, name: str) -> list[Path]:
    return [folder / name] if (folder / name).is_file() else [*folder.glob(f"*/{name}")]


def _together(table: Sequence[Result], result: Result) -> bool:
    if "metric" in result["protocol"]:  # a data file's protocol is its own
        return False
    return _protocol(table[0]) == _protocol(result) and all(each["task"] != result["task"] for each in table)


def _protocol(result: Result) -> str:
    protocol = result["protocol"]
    if "metric" in protocol:
        return f"{protocol['metric']} match {result['protocol_hash']}"
    return f"{protocol['name']}, version {protocol['version']}"


def _rows(result: Result, names: Sequence[str]) -> list[list[Any]]:
    total, metrics = result["results"][0]["total"], _metrics(result)
    if not metrics:
        return [[result["task"], total, *(_cell(result, name) for name in names)]]
    of_name = {each["name"]: each["metrics"] for each in result["results"]}
    return [
        [f"{result['task']} {key}", total, *(_number(of_name.get(name, {}).get(key)) for name in names)]
        for key in metrics
    ]


def _metrics(result: Result) -> list[str]:
    """lm-eval's names of what it measured, without the standard errors."""
    keys = dict.fromkeys(key for each in result["results"] for key in each.get("metrics", ()))
    return [key for key in keys if not key.partition(",")[0].endswith("_stderr")]


def _number(value: Any) -> str | None:
    return f"{value:.4f}" if isinstance(value, float) else None if value is None else str(value)


def _cell(result: Result, name: str) -> str | None:
    found = next((each for each in result["results"] if each["name"] == name), None)
    if found is None:
        return None
    kind = next((kind for kind in SCORES if found.get(kind) is not None), None)
    if kind is None:
        return "-"
    value = found[kind]
    return f"{value:.1%}" if kind == "accuracy" else f"{value:.2f} {SCORES[kind]}"

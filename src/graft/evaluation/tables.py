"""Put results side by side: one table per protocol, with a row per task, a column per candidate, and the average below.

The average is the unweighted mean over tasks, as in the tables of papers: each task counts once, whatever its number of
questions. A table holds results of one protocol only, so scores of different protocols never share a column.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from graft.evaluation.journal import ANSWERS, RESULT, read_result

SCORES = {"accuracy": "accuracy", "bleu": "BLEU", "pearson": "Pearson"}
"""The score that a table shows, and its name there. It is the first of these that a result has."""

Result = Mapping[str, Any]


@dataclass(frozen=True)
class Table:
    """One table: results of one protocol."""

    protocol: str
    results: tuple[Result, ...]

    @property
    def candidates(self) -> list[str]:
        return list(dict.fromkeys(each["name"] for result in self.results for each in result["results"]))

    def rows(self) -> list[list[Any]]:
        """Return the rows: task, number of questions, one score per candidate. The average is last, if there are several tasks.

        Results of lm-eval have a row for each metric of a task, with lm-eval's number of digits; the average is of the accuracy.
        """
        found = [row for result in self.results for row in _rows(result, self.candidates)]
        means = averages(self.results)
        most = max((mean["tasks"] for mean in means.values()), default=0)
        if most > 1:
            cells = [f"{means[name]['accuracy']:.1%}" if name in means else None for name in self.candidates]
            found.append([f"average of {most} tasks", None, *cells])
        return found


def averages(results: Sequence[Result]) -> dict[str, dict[str, Any]]:
    """Return candidate -> mean accuracy over the tasks that have one, and the number of these tasks."""
    found: dict[str, list[float]] = {}
    for result in results:
        for each in result["results"]:
            if "accuracy" in each:
                found.setdefault(each["name"], []).append(each["accuracy"])
    most = max(map(len, found.values()), default=0)
    # A mean over fewer tasks than another candidate's would look comparable without being so. It is left out.
    return {name: {"accuracy": sum(a) / len(a), "tasks": len(a)} for name, a in found.items() if len(a) == most}


def group_tables(results: Sequence[Result]) -> list[Table]:
    """Sort results into tables by protocol. Results of one task with different hashes go to different tables."""
    tables: list[list[Result]] = []
    for result in results:
        place = next((table for table in tables if _together(table, result)), None)
        if place is None:
            tables.append([result])
        else:
            place.append(result)
    return [Table(_protocol(table[0]), tuple(table)) for table in tables]


def saved_results(folder: Path) -> list[Result]:
    """Read the results in a folder of results, or in the folder of one, in the order in which they were written."""
    files = sorted(_in(folder, RESULT), key=lambda path: (path.stat().st_mtime, path))
    return [{**read_result(path.parent), "folder": str(path.parent)} for path in files]


def unfinished_folders(folder: Path) -> list[Path]:
    """Return the folders that hold answers of an interrupted evaluation."""
    return sorted(path.parent for path in _in(folder, ANSWERS) if not (path.parent / RESULT).is_file())


def _in(folder: Path, name: str) -> list[Path]:
    return [folder / name] if (folder / name).is_file() else [*folder.glob(f"*/{name}")]


def _together(table: Sequence[Result], result: Result) -> bool:
    if "metric" in result["protocol"]:  # each data file has a protocol of its own
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
    """Return the names of lm-eval's metrics, without the standard errors."""
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

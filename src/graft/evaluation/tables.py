"""Put results side by side: one table per protocol, with a row per task, a column per candidate, and the average below.

A score stands with its 95 % interval. That of the average follows from the intervals of the tasks (MOVER: Zou and Donner 2008,
Stat. Med. 27:1693).

The average is the unweighted mean over tasks, as in the tables of papers: each task counts once, whatever its number of
questions. A table holds results of one protocol only, so scores of different protocols never share a column.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from graft.evaluation.journal import ANSWERS, RESULT, read_result

SCORES = {"accuracy": "accuracy", "bleu": "BLEU", "pearson": "Pearson"}
"""The score that a table shows, and its name there. It is the first of these that a result has."""

Result = Mapping[str, Any]


@dataclass(frozen=True)
class Score:
    """One score of one candidate, as a table shows it."""

    task: str
    total: int | None
    """Number of questions; None for an average."""
    candidate: str
    name: str
    """accuracy, BLEU, Pearson, or the name of a metric of lm-eval."""
    value: float | None
    interval: Sequence[float] | None


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
        if means := self._averages():
            shown = {mean.candidate: _shown(mean) for mean in means}
            found.append([means[0].task, None, *(shown.get(name) for name in self.candidates)])
        return found

    def scores(self) -> list[Score]:
        """Return the same as a list of scores, in the order of the rows, with the average last."""
        return [*(score for result in self.results for score in _scores(result)), *self._averages()]

    def _averages(self) -> list[Score]:
        """Return the averages of the candidates, if there are several tasks."""
        intervals = average_intervals(self.results)
        return [
            Score(f"average of {mean['tasks']} tasks", None, name, "accuracy", mean["accuracy"], intervals.get(name))
            for name, mean in averages(self.results).items()
            if mean["tasks"] > 1
        ]


def averages(results: Sequence[Result]) -> dict[str, dict[str, Any]]:
    """Return candidate -> mean accuracy over the tasks that have one, and the number of these tasks."""
    return {name: {"accuracy": _mean(own), "tasks": len(own)} for name, own in _averaged(results).items()}


def average_intervals(results: Sequence[Result]) -> dict[str, list[float]]:
    """Return candidate -> interval of its average. Candidates with a task that has no interval are left out.

    The tasks are independent, so the distances of their bounds to their accuracies add in squares.
    """
    found = {}
    for name, own in _averaged(results).items():
        intervals = [each["interval"] for each in own if each.get("interval") is not None]
        if len(intervals) == len(own):
            low, high = (
                math.hypot(*(each["accuracy"] - bounds[side] for each, bounds in zip(own, intervals, strict=True)))
                for side in (0, 1)
            )
            found[name] = [_mean(own) - low / len(own), _mean(own) + high / len(own)]
    return found


def _averaged(results: Sequence[Result]) -> dict[str, list[Result]]:
    """Return candidate -> its entries with an accuracy, for the candidates that are averaged."""
    found: dict[str, list[Result]] = {}
    for result in results:
        for each in result["results"]:
            if "accuracy" in each:
                found.setdefault(each["name"], []).append(each)
    most = max(map(len, found.values()), default=0)
    # A mean over fewer tasks than another candidate's would look comparable without being so. It is left out.
    return {name: own for name, own in found.items() if len(own) == most}


def _mean(own: Sequence[Result]) -> float:
    return sum(each["accuracy"] for each in own) / len(own)


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
    if _is_data_file(result):
        return False
    return _protocol(table[0]) == _protocol(result) and all(each["task"] != result["task"] for each in table)


def _protocol(result: Result) -> str:
    protocol = result["protocol"]
    if _is_data_file(result):
        what = f"{protocol['metric']} match" if "metric" in protocol else protocol["name"]
        return f"{what} {result['protocol_hash']}"
    return f"{protocol['name']}, version {protocol['version']}"


def _is_data_file(result: Result) -> bool:
    """Whether the questions come from a data file. Each has a protocol of its own; that of labels or pairs has no version."""
    return "metric" in result["protocol"] or "version" not in result["protocol"]


def _rows(result: Result, names: Sequence[str]) -> list[list[Any]]:
    total, scores = result["results"][0]["total"], _scores(result)
    kinds = list(dict.fromkeys(score.name for score in scores)) if _metrics(result) else [None]
    rows = []
    for kind in kinds:
        own = {score.candidate: _shown(score) for score in scores if kind in (None, score.name)}
        rows.append([f"{result['task']} {kind}" if kind else result["task"], total, *(own.get(name) for name in names)])
    return rows


def _scores(result: Result) -> list[Score]:
    """Return the scores of a result that tables show: one per candidate, and of lm-eval one per metric too."""
    found = []
    for each in result["results"]:
        for key in _metrics(result):
            found.append(
                Score(result["task"], each["total"], each["name"], key, each.get("metrics", {}).get(key), None)
            )
        if not _metrics(result):
            kind = next((kind for kind in SCORES if each.get(kind) is not None), None)
            interval = each.get("interval", each.get(f"{kind}_interval"))
            name, value = (SCORES[kind], each[kind]) if kind is not None else ("", None)
            found.append(Score(result["task"], each["total"], each["name"], name, value, interval))
    return found


def _metrics(result: Result) -> list[str]:
    """Return the names of lm-eval's metrics, without the standard errors."""
    keys = dict.fromkeys(key for each in result["results"] for key in each.get("metrics", ()))
    return [key for key in keys if not key.partition(",")[0].endswith("_stderr")]


def _shown(score: Score) -> str | None:
    """Write a score with its interval."""
    if score.value is None:
        return "-" if score.name == "" else None
    if score.name not in SCORES.values():  # of lm-eval, with its number of digits
        return f"{score.value:.4f}" if isinstance(score.value, float) else str(score.value)
    form, unit = ("{:.1%}", "") if score.name == "accuracy" else ("{:.2f}", f" {score.name}")
    text = form.format(score.value) + unit
    if score.interval is None:
        return text
    return f"{text} (from {form.format(score.interval[0])} to {form.format(score.interval[1])})"

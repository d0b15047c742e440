"""Read files of outputs that any program may have written.

A file has one row per output, in JSON, JSON lines, CSV, TSV or Parquet, with columns for the output and the right answer; or it
is a text file with one output per line. If it holds no right answers, they are taken from the benchmark, row by row.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from graft.data.file_readers import file_type, read_rows
from graft.errors import GraftError, did_you_mean
from graft.evaluation.scoring import Output
from graft.evaluation.tasks import Record, Task

FIELDS = (
    ("output_pred", "answer"),  # the logs of LLM-Adapters, in which `output` comes from the data set
    ("answer", "reference"),  # Graft's answers.jsonl
    ("output", "answer"),  # the data sets of LLM-Adapters
    ("response", "gold"),
)
"""Known pairs of columns (output, right answer), in the order in which they are looked for."""


def read_outputs(
    file: Path,
    task: Task,
    data: str | Path | None = None,
    *,
    output: str | None = None,
    gold: str | None = None,
    candidate: str | None = None,
) -> list[Output]:
    """Read the outputs of a file with their right answers.

    data: file or folder of the benchmark, which replaces right answers in the file. output, gold: names of the columns.
    candidate: name of the candidate to read, if the file holds answers of several.
    Raises `GraftError` for a missing file, a missing column, and a row without an output or an answer.
    """
    if not file.is_file():
        raise GraftError(f"there is no file {file}")
    if file_type(file) in (None, ".txt"):
        texts = file.read_text(encoding="utf-8").splitlines()
        return _with_gold(
            file, [(text, number) for number, text in enumerate(texts, start=1)], _load_records(task, data, file)
        )
    rows = list(enumerate(read_rows(file), start=1))
    if not rows:
        raise GraftError(f"{file} holds no rows")
    rows = _candidate_rows(file, rows, candidate)
    output, gold = _names(file, rows[0][1], output, gold, needs_gold=data is None)
    texts = [(_text(file, number, row, output), number) for number, row in rows]
    if data is not None:
        return _with_gold(file, texts, task.load(data))
    if task.answer == "text":
        return [_with_references(task, file, text, row) for (text, _), (_, row) in zip(texts, rows, strict=True)]
    records = [
        task.record({"instruction": "?", "answer": row.get(str(gold))}, str(file), number) for number, row in rows
    ]
    return [Output(text, record.gold) for (text, _), record in zip(texts, records, strict=True)]


def _with_references(task: Task, file: Path, text: str, row: dict[str, Any]) -> Output:
    """Return an output with all its right texts, which Graft's answers.jsonl holds."""
    if not row.get("references"):
        _load_records(task, None, file)
    return Output(text, row["references"][0], tuple(row["references"]))


def _load_records(task: Task, data: str | Path | None, file: Path) -> list[Record]:
    if data is None:
        raise GraftError(f"{file} does not hold the right answers: say where those of '{task.name}' are with --data")
    return task.load(data)


def _with_gold(file: Path, texts: Sequence[tuple[str, int]], records: Sequence[Record]) -> list[Output]:
    if len(texts) != len(records):
        raise GraftError(
            f"{file} holds {len(texts)} outputs, but there are {len(records)} questions in {records[0].source}"
        )
    return [Output(text, record.gold, record.references) for (text, _), record in zip(texts, records, strict=True)]


def _names(
    file: Path, row: dict[str, Any], output: str | None, gold: str | None, needs_gold: bool
) -> tuple[str, str | None]:
    """Return the columns to read: those that were named, else the first known pair that the file has."""
    for name in filter(None, (output, gold)):
        if name not in row:
            raise GraftError(f"{file} has no column '{name}'.{did_you_mean(name, row)} It has: {', '.join(row)}")
    pairs = [(output or theirs, gold or right) for theirs, right in FIELDS]
    found = next((pair for pair in pairs if pair[0] in row and (pair[1] in row or not needs_gold)), None)
    if found is None:
        known = ", ".join(f"{theirs}/{right}" for theirs, right in FIELDS)
        raise GraftError(
            f"{file}: name the columns of outputs and right answers with --output and --gold; looked for {known}. "
            f"It has: {', '.join(row)}"
        )
    return found


def _text(file: Path, number: int, row: dict[str, Any], name: str) -> str:
    if row.get(name) is None:
        raise GraftError(f"{file}, row {number}: there is no output ('{name}')")
    return str(row[name])


def _candidate_rows(
    file: Path, rows: list[tuple[int, dict[str, Any]]], candidate: str | None
) -> list[tuple[int, dict[str, Any]]]:
    """Return the rows of one candidate in the order of the data. A file that names no candidates is returned as it is."""
    names = list(dict.fromkeys(row["contestant"] for _, row in rows if "contestant" in row))
    if candidate is None and len(names) > 1:
        raise GraftError(f"{file} holds answers of {', '.join(names)}: choose one with --contestant")
    if candidate is not None and candidate not in names:
        near = did_you_mean(candidate, names)
        raise GraftError(
            f"{file} holds no answers of '{candidate}'.{near} It has: {', '.join(names) or 'no candidates'}"
        )
    if not names:
        return rows
    own = [(number, row) for number, row in rows if row.get("contestant") == (candidate or names[0])]
    return sorted(own, key=lambda pair: pair[1]["row"])  # answers.jsonl has the order of generation

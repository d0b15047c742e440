"""Read the rows of one file as mappings from column to value.

CSV, TSV and Parquet go through `datasets`, streamed. So nothing is copied to a cache that could become stale, and nothing is reported
to the hub, as `load_dataset` does even for a local file. Cells of CSV and TSV are text: "007" stays "007" and "NA" is a
word. TSV has no quoting (media type text/tab-separated-values).

JSON goes through the standard library. When `datasets` streams a JSON list it quotes the values of a column with several types
('"5"'), and it refuses a file in which a column first appears after some megabytes.
"""

from __future__ import annotations

import csv
import glob
import json
from pathlib import Path
from typing import Any

from graft.errors import GraftError

Row = dict[str, Any]
FILE_TYPES = {".json": "JSON", ".jsonl": "JSON lines", ".csv": "CSV", ".tsv": "TSV", ".parquet": "Parquet"}


def read_rows(file: Path) -> list[Row]:
    """Return all rows of a file. Raises `GraftError` if the file is empty or unreadable, with the line if it is known."""
    if file.stat().st_size == 0:
        raise GraftError(f"{file} is empty")
    suffix = file.suffix.lower()
    try:
        if suffix in (".json", ".jsonl"):
            return _json_rows(file, lines=suffix == ".jsonl")
        return _table_rows(file)
    except GraftError:
        raise
    except (ValueError, csv.Error, OSError) as error:
        raise GraftError(f"{file} cannot be read as {FILE_TYPES[suffix]}: {error}") from error


def _json_rows(file: Path, *, lines: bool) -> list[Row]:
    text = file.read_text(encoding="utf-8-sig")
    if not lines:
        try:
            rows = json.loads(text)
        except json.JSONDecodeError as error:
            if not error.msg.startswith("Extra data"):  # "Extra data": a .json file with one object per line
                raise
            lines = True
    if lines:
        rows = [_json_line(line, number) for number, line in enumerate(text.split("\n"), start=1) if line.strip()]
    if isinstance(rows, dict):
        listed = [key for key, value in rows.items() if isinstance(value, list)]
        hint = f"; its key '{listed[0]}' holds a list: write only that list to the file" if listed else ""
        raise GraftError(f"{file} holds one object; it must hold a list of rows, or one row per line{hint}")
    if not isinstance(rows, list):
        raise GraftError(f"{file} holds a value of type {type(rows).__name__}; it must hold a list of rows")
    for number, row in enumerate(rows, start=1):
        if not isinstance(row, dict):
            raise GraftError(
                f"{file}, row {number}: must be an object with named fields, but is {json.dumps(row)[:40]}"
            )
    return rows


def _json_line(line: str, number: int) -> Any:
    try:
        return json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"{error.msg}: line {number} column {error.colno}") from error


def _table_rows(file: Path) -> list[Row]:
    from datasets import IterableDataset, logging

    name = glob.escape(str(file))
    level = logging.get_verbosity()
    logging.set_verbosity(logging.CRITICAL)  # the error that it raises says the same
    try:
        if file.suffix.lower() == ".parquet":
            return list(IterableDataset.from_parquet(name))
        return list(IterableDataset.from_csv(name, **_csv_options(file)))
    finally:
        logging.set_verbosity(level)


def _csv_options(file: Path) -> dict[str, Any]:
    """Return options that read every cell as text, none of them as a missing value or a row number.

    Raises `GraftError` if a row does not have one cell per column.
    """
    from datasets import Features, Value

    dialect: dict[str, Any] = {"quoting": csv.QUOTE_MINIMAL, "delimiter": ","}
    if file.suffix.lower() == ".tsv":
        dialect = {"quoting": csv.QUOTE_NONE, "delimiter": "\t"}
    with open(file, encoding="utf-8-sig", newline="") as lines:
        rows = csv.reader(lines, **dialect)
        columns = next(rows)
        for number, row in enumerate(filter(None, rows), start=1):
            if len(row) != len(columns):
                raise GraftError(
                    f"{file}, row {number}: has {len(row)} cells, but the header names {len(columns)} columns"
                )
    features = Features({column: Value("string") for column in columns})
    return {**dialect, "features": features, "keep_default_na": False, "index_col": False, "encoding": "utf-8-sig"}

"""Tables of text: CSV and TSV. Every cell is text as it stands: "007" stays "007" and "NA" is a word.

CSV has quotation marks. TSV has none by its standard (media type text/tab-separated-values), but many programs write it with the
marks of CSV. It is read so if its cells say so: all that begin with a mark also end with one, and one of them holds a doubled mark, a tab
or a line end, or all cells stand in marks.
"""

from __future__ import annotations

import csv
import io
import re
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from graft.data.text_format import TextFormat
from graft.errors import GraftError

Row = dict[str, Any]
QUOTED = re.compile(r'(?:(?<=\t)|^)"((?:[^"]|"")*)"(?=\t|\r?$)', re.MULTILINE)
_limit_lock = threading.Lock()


def table_rows(file: Path, text: str, kind: str, written: TextFormat) -> list[Row]:
    """Return the rows of a table.

    Raises `GraftError` for a header that names a column twice, for a row that does not have one cell per column, and for marks that
    are not closed.
    """
    delimiter = written.delimiter or {".csv": ",", ".tsv": "\t"}[kind]
    quotes = written.quotes
    if quotes is None:
        quotes = kind == ".csv" or (delimiter == "\t" and _is_quoted(text))
    dialect: dict[str, Any] = {"delimiter": delimiter, "quoting": csv.QUOTE_MINIMAL if quotes else csv.QUOTE_NONE}
    cells = _cells(file, text, kind, dialect)
    if not cells:
        raise GraftError(f"{file} holds no rows")
    columns = list(written.columns) or [name.strip() for name in cells.pop(0)]
    columns = [name or f"column {place} (unnamed)" for place, name in enumerate(columns, start=1)]
    twice = [name for name in columns if columns.count(name) > 1]
    if twice:
        raise GraftError(
            f"{file}: the header names the column '{twice[0]}' twice. If the file has no header, name its columns in the source: "
            f"{{path: {file}, columns: [prompt, completion]}}"
        )
    for number, row in enumerate(cells, start=1):
        if len(row) != len(columns):
            raise GraftError(
                f"{file}, row {number}: has {len(row)} cells, but the header names {len(columns)} columns"
                + (f" (delimiter '{delimiter}')" if len(columns) == 1 or written.delimiter else "")
            )
    drop = _row_numbers(columns, cells)
    return [
        {name: cell for place, (name, cell) in enumerate(zip(columns, row, strict=True)) if place != drop}
        for row in cells
    ]


def hint_for(file: str, columns: list[str]) -> str:
    """Return what to try with a table whose columns fit nothing: another delimiter, or names for a file without a header."""
    for delimiter, shown in ((";", ";"), ("\t", "\\t"), ("|", "|")):
        if len(columns) == 1 and delimiter in columns[0]:
            return f'\nThe header holds "{shown}": name it in the source, {{path: {file}, delimiter: "{shown}"}}'
    return (
        f"\nIf the file has no header, name its columns in the source: {{path: {file}, columns: [prompt, completion]}}"
    )


def _cells(file: Path, text: str, kind: str, dialect: dict[str, Any]) -> list[list[str]]:
    with _long_cells():
        reader = csv.reader(io.StringIO(text, newline=""), strict=True, **dialect)
        try:
            return [row for row in reader if row]
        except csv.Error as error:
            raise GraftError(
                f"{file} cannot be read as {kind[1:].upper()}: {error}, line {reader.line_num}. A quotation mark in a cell is written "
                "twice; `quotes: false` in the source reads marks as text"
            ) from error


def _row_numbers(columns: list[str], cells: list[list[str]]) -> int | None:
    """Return the place of an unnamed column that counts the rows from 0 or 1, as pandas writes it."""
    for place, name in enumerate(columns):
        if name == f"column {place + 1} (unnamed)" and cells and cells[0][place] in ("0", "1"):
            first = int(cells[0][place])
            if all(row[place] == str(number) for number, row in enumerate(cells, start=first)):
                return place
    return None


def _is_quoted(text: str) -> bool:
    if '"' not in text:
        return False
    try:
        with _long_cells():
            rows = [row for row in csv.reader(io.StringIO(text, newline=""), delimiter="\t", strict=True) if row]
    except csv.Error:
        return False
    if len({len(row) for row in rows}) != 1:
        return False
    marked = [found.group(1) for found in QUOTED.finditer(text)]
    return any(re.search(r'""|[\t\n]', inside) for inside in marked) or len(marked) == sum(map(len, rows))


@contextmanager
def _long_cells() -> Iterator[None]:
    """Let cells be of any length; csv's own limit is 131,072 characters."""
    with _limit_lock:
        before = csv.field_size_limit(min(sys.maxsize, 2**31 - 1))
        try:
            yield
        finally:
            csv.field_size_limit(before)

"""Read the rows of one file as mappings from column to value: JSON, JSON lines and Parquet here, tables of text in delimited.py.

Text stays as it is written: the JSON number 1.10 is "1.10" where a text is needed, and a cell of CSV is text. NaN is an empty cell.
Any file may be compressed with gzip. UTF-8 is expected, or what a byte-order mark says; `TextFormat` names another encoding.
"""

from __future__ import annotations

import codecs
import csv
import gzip
import json
import math
import stat
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from graft.data.delimited import table_rows
from graft.data.text_format import TextFormat
from graft.errors import GraftError

Row = dict[str, Any]
FILE_TYPES = {
    ".json": "JSON",
    ".jsonl": "JSON lines",
    ".csv": "CSV",
    ".tsv": "TSV",
    ".parquet": "Parquet",
    ".txt": "text",
}
EXPECTED = ", ".join(FILE_TYPES) + ", or one of these with .gz"
MARKS = {codecs.BOM_UTF8: "utf-8-sig", codecs.BOM_UTF16_LE: "utf-16", codecs.BOM_UTF16_BE: "utf-16"}


class WrittenNumber(float):
    """A number of a JSON file that remembers how it is written."""

    written: str

    def __new__(cls, written: str) -> WrittenNumber:
        made = super().__new__(cls, written)
        made.written = written
        return made

    def __str__(self) -> str:
        return self.written

    def __reduce__(self) -> tuple[type, tuple[str]]:
        return type(self), (self.written,)


def file_type(file: Path) -> str | None:
    """Return the suffix that says what a file holds, without .gz; None if it is none of `FILE_TYPES`."""
    suffix = file.suffix.lower()
    suffix = Path(file.stem).suffix.lower() if suffix == ".gz" else suffix
    return suffix if suffix in FILE_TYPES else None


def read_rows(file: Path, written: TextFormat | None = None) -> list[Row]:
    """Return all rows of a file. Raises `GraftError` if the file is empty or unreadable, with the line if it is known."""
    written = written or TextFormat()
    kind = file_type(file)
    if kind is None:
        raise GraftError(f"{file}: unknown file type '{file.suffix}', expected {EXPECTED}")
    _refuse_without_effect(file, kind, written)
    try:
        content = _content(file)
        if not content:
            raise GraftError(f"{file} is empty")
        if kind == ".parquet":
            return _parquet_rows(file, content)
        text = _decoded(file, content, FILE_TYPES[kind], written.encoding)
        del content
        if kind in (".json", ".jsonl"):
            return _json_rows(file, text, lines=kind == ".jsonl")
        return _text_rows(file, text, kind, written)
    except GraftError:
        raise
    except (ValueError, csv.Error, OSError, EOFError, zlib.error, RecursionError, MemoryError) as error:
        reason = "it is nested too deeply" if isinstance(error, RecursionError) else str(error) or type(error).__name__
        raise GraftError(f"{file} cannot be read as {FILE_TYPES[kind]}: {reason}") from error


def read_lines(file: Path) -> list[str]:
    """Return the lines of a file of text, without their ends. Raises `GraftError` if it cannot be read."""
    try:
        return _lines(_decoded(file, _content(file), "text"))
    except (OSError, EOFError, zlib.error) as error:
        raise GraftError(f"{file} cannot be read: {error}") from error


def check_regular(file: Path) -> None:
    """Raise `GraftError` for a pipe, a socket or a device: reading it might never end."""
    if not stat.S_ISREG(file.stat().st_mode):
        raise GraftError(f"{file} is a pipe or a device, and not a file of data: write its content to a file")


def _content(file: Path) -> bytes:
    check_regular(file)
    if file.suffix.lower() == ".gz":
        with gzip.open(file) as opened:
            return opened.read()
    return file.read_bytes()


def _decoded(file: Path, content: bytes, kind: str, encoding: str | None = None) -> str:
    found = encoding or next((name for mark, name in MARKS.items() if content.startswith(mark)), "utf-8")
    try:
        return content.decode(found)
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise GraftError(
            f"{file} cannot be read as {kind}: line {line} holds the byte 0x{content[error.start]:02x}, which is not {found}. Name its "
            f"encoding in the source, e.g. {{path: {file}, encoding: latin-1}}"
        ) from None
    except (LookupError, UnicodeError) as error:
        raise GraftError(f"{file} cannot be read with the encoding '{found}': {error}") from None


def _lines(text: str) -> list[str]:
    """Split text at line ends. Other separators that Unicode knows (U+2028) are part of a line."""
    return text.replace("\r\n", "\n").replace("\r", "\n").split("\n")


def _refuse_without_effect(file: Path, kind: str, written: TextFormat) -> None:
    table = {"delimiter": written.delimiter, "quotes": written.quotes, "columns": written.columns or None}
    given = {"encoding": written.encoding} if kind == ".parquet" else {}
    given |= table if kind not in (".csv", ".tsv") else {}
    for name, value in given.items():
        if value is not None:
            raise GraftError(f"{file}: `{name}` has no effect on {FILE_TYPES[kind]}: remove it")


def _json_rows(file: Path, text: str, *, lines: bool) -> list[Row]:
    if not lines:
        try:
            rows = _json(text)
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
            shown = json.dumps(row, default=str)[:40]
            raise GraftError(f"{file}, row {number}: must be an object with named fields, but is {shown}")
    return rows


def _json(text: str) -> Any:
    return json.loads(text, parse_float=_number, parse_int=_whole, parse_constant=_constant, object_pairs_hook=_mapping)


def _json_line(line: str, number: int) -> Any:
    try:
        return _json(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"{error.msg}: line {number} column {error.colno}") from error
    except ValueError as error:
        raise ValueError(f"{error}: line {number}") from error


def _number(written: str) -> float:
    """Return a number; as it is written, where Python would write it differently."""
    value = float(written)
    return value if repr(value) == written else WrittenNumber(written)


def _whole(written: str) -> int | float:
    return int(written) if len(written) < 4000 and written != "-0" else WrittenNumber(written)


def _constant(name: str) -> float | None:
    """NaN is an empty cell; an infinity stays one, and is refused where a text or a label is needed."""
    return None if name == "NaN" else float(name)


def _mapping(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"an object names the key '{twice}' twice")
    return made


def _text_rows(file: Path, text: str, kind: str, written: TextFormat) -> list[Row]:
    if "\0" in text:
        line = text.count("\n", 0, text.index("\0")) + 1
        raise GraftError(
            f"{file} is not a file of text: line {line} holds a NUL. It may be binary, or have another encoding"
        )
    if kind == ".txt":
        return [{"text": line} for line in _lines(text) if line.strip()]
    return table_rows(file, text, kind, written)


def _parquet_rows(file: Path, content: bytes) -> list[Row]:
    import pyarrow
    from pyarrow import parquet

    try:
        table = parquet.read_table(pyarrow.BufferReader(content))
        names = table.column_names
        twice = [name for name in names if names.count(name) > 1]
        if twice:
            raise GraftError(f"{file} has two columns named '{twice[0]}'")
        kept = [name for name in names if not name.startswith("__index_level_")]  # the row numbers that pandas writes
        return [_without_nulls(row) for row in table.select(kept).to_pylist()]
    except pyarrow.ArrowException as error:
        raise ValueError(str(error)) from error


def _without_nulls(row: Row) -> Row:
    """Drop what Parquet adds: a null for each key that another row has, and NaN for an empty cell."""
    return {
        name: None if isinstance(value, float) and math.isnan(value) else _pruned(value) for name, value in row.items()
    }


def _pruned(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _pruned(inner) for key, inner in value.items() if inner is not None}
    return list(map(_pruned, value)) if isinstance(value, Iterable) and isinstance(value, list) else value

"""Reading data sets through `datasets`: JSON, JSONL, CSV, TSV, Parquet, folders and globs of these, and hub names.

Local files are streamed, so nothing is copied and no stale copy can be read, and nothing is reported to the hub, which
`load_dataset` does even for a local file. Columns of CSV and TSV are read as text:
"007" stays "007" and "NA" is a word. TSV has no quoting, as the media type says.
"""

from __future__ import annotations

import csv
import glob
import hashlib
import json
import re
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any, cast

from graft.config.schema import SourceConfig
from graft.data.samples import Sample
from graft.data.shapes import RowError, Shape, detect
from graft.errors import GraftError, nearest

LOADERS = {".json": "json", ".jsonl": "json", ".csv": "csv", ".tsv": "csv", ".parquet": "parquet"}
SPLITS = {"train": "train", "training": "train", "test": "test", "dev": "validation", "valid": "validation",
          "validation": "validation", "val": "validation", "eval": "validation"}  # fmt: skip


def read(source: SourceConfig | str, *, need_answers: bool = True) -> list[Sample]:
    """All rows of a source as conversations.

    With `need_answers=False` a row may lack its answer (a file of prompts); its conversation then ends with the question.
    Raises `GraftError` for a file that is missing, empty or unreadable, for columns of no known shape, and for a row of
    the wrong shape, with the row number (from 1) and the field.
    """
    source = SourceConfig(path=source) if isinstance(source, str) else source
    files = local_files(source)
    if files is None:
        rows = _hub_rows(source)
        samples = _samples(rows, source, source.path, source.limit, need_answers)
    else:
        samples = []
        for file in files:
            left = None if source.limit is None else source.limit - len(samples)
            if left == 0:
                break
            samples += _samples(_file_rows(file), source, str(file), left, need_answers)
    if not samples:
        raise GraftError(f"{source.path} holds no rows")
    return samples


def local_files(source: SourceConfig) -> list[Path] | None:
    """The files of a source in sorted order, or None when its path is a hub name. Raises `GraftError` when there is none."""
    path = Path(source.path).expanduser()
    if path.is_file():
        if path.suffix.lower() not in LOADERS:
            raise GraftError(f"{path}: unknown kind of file '{path.suffix}', expected {', '.join(LOADERS)}")
        return [path]
    if path.is_dir():
        return _of_split(path, sorted(f for f in path.rglob("*") if f.suffix.lower() in LOADERS), source.split)
    if glob.has_magic(source.path):
        found = sorted(Path(f) for f in glob.glob(str(path), recursive=True) if Path(f).suffix.lower() in LOADERS)
        if not found:
            raise GraftError(f"no data file matches {source.path} (kinds: {', '.join(LOADERS)})")
        return found
    if path.suffix.lower() in LOADERS or not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", source.path):
        raise GraftError(f"{source.path}: no such file.{_near(path)}")
    return None


def content_hash(source: SourceConfig) -> str | None:
    """SHA-256 over the names and bytes of the source's files; None for a hub name, whose rows must be read to be known."""
    files = local_files(source)
    if files is None:
        return None
    digest = hashlib.sha256()
    for file in files:
        digest.update(str(file).encode())
        with open(file, "rb") as opened:
            digest.update(hashlib.file_digest(opened, "sha256").digest())
    return digest.hexdigest()


def _samples(
    rows: Iterator[dict[str, Any]], source: SourceConfig, name: str, limit: int | None, need_answers: bool
) -> list[Sample]:
    shape: Shape | None = None
    samples = []
    for number, raw in enumerate(islice(rows, limit), start=1):
        if shape is None:
            if missing := [theirs for theirs in source.fields.values() if theirs not in raw]:
                raise GraftError(
                    f"{name}: `fields` names the column '{missing[0]}', which is not there; "
                    f"the columns are {', '.join(raw)}"
                )
            shape = detect({**raw, **source.fields}, source.format, name, need_answers)
        row = {**raw, **{ours: raw.get(theirs) for ours, theirs in source.fields.items()}}
        try:
            messages = shape.convert(row, need_answers)
        except RowError as error:
            raise GraftError(f"{name}, row {number}, {error}") from None
        samples.append(Sample(tuple(messages), name, number))
    return samples


def _file_rows(file: Path) -> Iterator[dict[str, Any]]:
    import datasets
    from datasets.exceptions import DatasetsError

    if file.stat().st_size == 0:
        raise GraftError(f"{file} is empty")
    loader = LOADERS[file.suffix.lower()]
    level = datasets.logging.get_verbosity()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # what it would log is in the error below
    try:
        options = _table_options(file) if loader == "csv" else {}
        yield from getattr(datasets.IterableDataset, f"from_{loader}")(glob.escape(str(file)), **options)
    except GraftError:
        raise
    except (ValueError, StopIteration, csv.Error, DatasetsError) as error:
        bad = _first_bad_line(file) if file.suffix.lower() == ".jsonl" else None
        raise GraftError(f"{file} cannot be read as {loader}: {bad or error}") from error
    finally:
        datasets.logging.set_verbosity(level)


def _table_options(file: Path) -> dict[str, Any]:
    """Every column as text, and no cell taken for a missing value or a row number."""
    import datasets

    dialect: dict[str, Any] = {"quoting": csv.QUOTE_MINIMAL, "delimiter": ","}
    if file.suffix.lower() == ".tsv":
        dialect = {"quoting": csv.QUOTE_NONE, "delimiter": "\t"}
    with open(file, encoding="utf-8-sig", newline="") as lines:
        rows = csv.reader(lines, **dialect)
        columns = next(rows)
        for number, row in enumerate(filter(None, rows), start=1):
            if len(row) != len(columns):
                raise GraftError(f"{file}, row {number}: {len(row)} cells, but the header names {len(columns)} columns")
    features = datasets.Features({column: datasets.Value("string") for column in columns})
    return {**dialect, "features": features, "keep_default_na": False, "index_col": False, "encoding": "utf-8-sig"}


def _first_bad_line(file: Path) -> str | None:
    with open(file, encoding="utf-8", errors="replace") as lines:
        for number, line in enumerate(lines, start=1):
            try:
                json.loads(line or "{}") if line.strip() else None
            except json.JSONDecodeError as error:
                return f"line {number}, column {error.colno}: {error.msg}"
    return None


def _hub_rows(source: SourceConfig) -> Iterator[dict[str, Any]]:
    import datasets
    from datasets.exceptions import DatasetsError

    try:
        loaded = datasets.load_dataset(source.path, source.name, split=source.split or "train")
    except (OSError, ValueError, DatasetsError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        near = _near(Path(source.path))
        raise GraftError(f"{source.path}: no such file here, and as a hub name it gives: {reason}{near}") from error
    for row in loaded:
        yield cast(dict[str, Any], row)


def _of_split(folder: Path, files: list[Path], split: str | None) -> list[Path]:
    """The folder's files of one split, told by the words in their names. Several splits and no choice is an error."""
    named = {file: _split_of(file.relative_to(folder)) for file in files}
    there = sorted({name for name in named.values() if name})
    if split is not None:
        wanted = SPLITS.get(split, split)
        files = [f for f in files if named[f] == wanted or split in re.split(r"[^A-Za-z0-9]+", f.stem)]
    elif len(there) > 1:
        raise GraftError(f"{folder} holds several splits ({', '.join(there)}); choose one with `split`, or name a file")
    if not files:
        what = f"no data file of the split '{split}'" if split else "no data file"
        raise GraftError(
            f"{folder} holds {what} ({', '.join(LOADERS)}){'; splits: ' + ', '.join(there) if there else ''}"
        )
    return files


def _split_of(file: Path) -> str | None:
    words = re.split(r"[^a-z0-9]+", str(file.with_suffix("")).lower())
    return next((SPLITS[word] for word in words if word in SPLITS), None)


def _near(path: Path) -> str:
    """A hint at the nearest existing file name."""
    if not path.parent.is_dir():
        return f" The folder {path.parent} does not exist either."
    found = nearest(path.name, [other.name for other in path.parent.iterdir()])
    return f" Did you mean '{path.parent / found}'?" if found else ""

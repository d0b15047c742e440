"""Read data sets as conversations: single files (file_readers.py), folders and globs of files, and names on the hub."""

from __future__ import annotations

import glob
import hashlib
import itertools
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple, cast

from graft.config.data import SourceConfig
from graft.data.cells import RowError
from graft.data.columns import MASKING, Seen, TrackedRow, check_unread
from graft.data.file_readers import FILE_TYPES, Row, read_rows
from graft.data.labelled_shapes import LABELS, labelled_shape
from graft.data.pair_shapes import SIDES, check_pairs, pair
from graft.data.samples import Sample
from graft.data.shapes import conversation, detect
from graft.errors import GraftError, nearest

SPLITS = {"train": "train", "training": "train", "test": "test", "dev": "validation", "valid": "validation",
          "validation": "validation", "val": "validation", "eval": "validation"}  # fmt: skip


def read(
    source: SourceConfig | str,
    *,
    need_answers: bool = True,
    task: str = "causal",
    unread: dict[str, list[str]] | None = None,
) -> list[Sample]:
    """Return all rows of a source as conversations.

    For the tasks classification and regression, a conversation has the texts as its questions and the label as its answer. For the task
    preference, each sample has a second conversation that ends with the rejected answer.

    With `need_answers=False` a row may lack its answer (a file of prompts); its conversation then ends with the question.
    unread: gets, under the source's path, the columns (and keys of turns) that nothing reads.
    Raises `GraftError` for a file that is missing, empty or unreadable, for columns of no known shape, and for a row of
    the wrong shape; the message names the row (counted from 1) and the field.
    """
    source = SourceConfig(path=source) if isinstance(source, str) else source
    return _samples(_tables(source, task), source, need_answers, task, unread)


def read_as_found(source: SourceConfig) -> tuple[list[Sample], bool]:
    """Return all rows of a source, and whether they are pairs of a preferred and a rejected answer (else they are conversations).

    The columns of the first row decide. Raises the same errors as `read`.
    """
    tables = _tables(source, "causal")
    first = next(tables)
    pairs = bool(first.rows) and all(name in {*first.rows[0], *source.fields} for name in SIDES)
    task = "preference" if pairs else "causal"
    return _samples(itertools.chain([first], tables), source, True, task), pairs


class Table(NamedTuple):
    """The rows of one file or of a data set on the hub."""

    name: str
    rows: list[Row]


def _tables(source: SourceConfig, task: str) -> Iterator[Table]:
    """Yield the tables of a source one by one, up to the source's limit of rows."""
    files, left = local_files(source), source.limit
    if files is None:
        yield Table(source.path, _hub_rows(source, task)[:left])
    for file in files or ():
        if left == 0:
            break
        table = Table(str(file), read_rows(file)[:left])
        left = None if left is None else left - len(table.rows)
        yield table


def local_files(source: SourceConfig) -> list[Path] | None:
    """Return the files of a source in sorted order, or None if its path is a hub name. Raises `GraftError` if there are no files."""
    path = Path(source.path).expanduser()
    if path.is_file():
        if path.suffix.lower() not in FILE_TYPES:
            raise GraftError(f"{path}: unknown file type '{path.suffix}', expected {', '.join(FILE_TYPES)}")
        return [path]
    if path.is_dir():
        return _of_split(path, sorted(f for f in path.rglob("*") if f.suffix.lower() in FILE_TYPES), source.split)
    if glob.has_magic(source.path):
        found = sorted(Path(f) for f in glob.glob(str(path), recursive=True) if Path(f).suffix.lower() in FILE_TYPES)
        if not found:
            raise GraftError(f"no data file matches {source.path} (file types: {', '.join(FILE_TYPES)})")
        return found
    if path.suffix.lower() in FILE_TYPES or not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", source.path):
        raise GraftError(f"{source.path}: no such file.{_near(path)}")
    return None


def content_hash(source: SourceConfig) -> str | None:
    """Return the SHA-256 of the names and bytes of a source's files; None for a hub name, which has no files here."""
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
    tables: Iterable[Table],
    source: SourceConfig,
    need_answers: bool,
    task: str,
    unread: dict[str, list[str]] | None = None,
) -> list[Sample]:
    samples: list[Sample] = []
    columns: list[str] = []
    for table in tables:
        found, unread_here = _of_table(table, source, need_answers, task)
        samples += found
        columns += unread_here
    if columns and unread is not None:
        unread[source.path] = list(dict.fromkeys(columns))
    if not samples:
        raise GraftError(f"{source.path} holds no rows")
    return samples


def _of_table(table: Table, source: SourceConfig, need_answers: bool, task: str) -> tuple[list[Sample], list[str]]:
    """Return the samples of a table, and the columns that nothing reads."""
    name, rows = table
    if not rows:
        return [], []
    rows = [{column: value for column, value in row.items() if column not in source.ignore} for row in rows]
    columns = list(dict.fromkeys(column for row in rows for column in row))  # of any row, in the order of appearance
    for theirs in source.fields.values():
        if theirs not in columns:
            raise GraftError(
                f"{name}: `fields` names the column '{theirs}', but the data have no such column; they have {', '.join(columns)}"
            )
    columns = list(dict.fromkeys([*columns, *source.fields]))
    to_sample = _converter(columns, source, name, need_answers, task)
    samples, seen = [], Seen(set(source.fields.values()))
    for number, row in enumerate(rows, start=1):
        renamed = {**row, **{ours: row.get(theirs) for ours, theirs in source.fields.items()}}
        try:
            samples.append(to_sample(TrackedRow(renamed, seen), number))
        except RowError as error:
            raise GraftError(f"{name}, row {number}, {error}") from None
    return samples, check_unread(name, rows, seen, source.ignore, () if need_answers else MASKING)


def _converter(
    columns: list[str], source: SourceConfig, name: str, need_answers: bool, task: str
) -> Callable[[Mapping[str, Any], int], Sample]:
    """Return the function that turns a row and its number into a sample; the task and the columns decide which."""
    if task == "preference":
        check_pairs(columns, source.format, name)

        def pair_sample(row: Mapping[str, Any], number: int) -> Sample:
            prompt, chosen, rejected = pair(row)
            return Sample((*prompt, *chosen), name, number, (*prompt, *rejected), len(prompt))

        return pair_sample
    if task in LABELS:
        labelled = labelled_shape(columns, source.format, name, task, need_answers)
        return lambda row, number: Sample(tuple(labelled.convert(row, need_answers)), name, number)
    shape = detect(columns, source.format, name, need_answers)
    return lambda row, number: Sample(tuple(conversation(shape, row, need_answers)), name, number)


def _hub_rows(source: SourceConfig, task: str) -> list[Row]:
    import datasets
    from datasets.exceptions import DatasetsError

    try:
        loaded = datasets.load_dataset(source.path, source.name, split=source.split or "train")
    except (OSError, ValueError, DatasetsError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        near = _near(Path(source.path))
        raise GraftError(
            f"{source.path}: there is no such file, and loading it from the hub failed: {reason}{near}"
        ) from error
    rows = [cast(Row, row) for row in loaded]
    return [_with_names(row, loaded.features) for row in rows] if task in LABELS else rows


def _with_names(row: Row, features: Mapping[str, Any]) -> Row:
    """Replace classes that the hub keeps as numbers by their names; -1 (no label) stays."""
    named = {
        column: features[column].int2str(value)
        for column, value in row.items()
        if isinstance(value, int) and value >= 0 and hasattr(features[column], "int2str")
    }
    return {**row, **named}


def _of_split(folder: Path, files: list[Path], split: str | None) -> list[Path]:
    """Return the files of one split; the words in their paths tell the split. Several splits without a choice are an error."""
    named = {file: _split_of(file.relative_to(folder)) for file in files}
    there = sorted({name for name in named.values() if name})
    if split is not None:
        wanted = SPLITS.get(split, split)
        files = [f for f in files if named[f] == wanted or split in re.split(r"[^A-Za-z0-9]+", f.stem)]
    elif len(there) > 1:
        raise GraftError(f"{folder} holds several splits ({', '.join(there)}): choose one with `split`, or name a file")
    if not files:
        what = f"no data file of the split '{split}'" if split else "no data file"
        raise GraftError(
            f"{folder} holds {what} ({', '.join(FILE_TYPES)}){'; splits: ' + ', '.join(there) if there else ''}"
        )
    return files


def _split_of(file: Path) -> str | None:
    words = re.split(r"[^a-z0-9]+", str(file.with_suffix("")).lower())
    return next((SPLITS[word] for word in words if word in SPLITS), None)


def _near(path: Path) -> str:
    """Return a hint for an error message: the existing file with the nearest name, or that the folder does not exist."""
    if not path.parent.is_dir():
        return f" The folder {path.parent} does not exist either."
    found = nearest(path.name, [other.name for other in path.parent.iterdir()])
    return f" Did you mean '{path.parent / found}'?" if found else ""

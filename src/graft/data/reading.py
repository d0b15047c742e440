"""Read data sets as conversations: single files (file_readers.py), folders and globs (folders.py), and names on the hub."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple, cast

from graft.config.data import GivenSource, SourceConfig
from graft.data.cells import RowError
from graft.data.columns import MASKING, Seen, TrackedRow, check_unread
from graft.data.delimited import hint_for
from graft.data.file_readers import Row, file_type, read_rows
from graft.data.folders import local_files, near
from graft.data.labelled_shapes import LABELS, labelled_shape
from graft.data.marked import LABEL, marked_sample
from graft.data.pair_shapes import SIDES, check_pairs, pair
from graft.data.rollouts import COLUMNS as ROLLOUT_COLUMNS
from graft.data.rollouts import rollout_sample
from graft.data.samples import Sample
from graft.data.shapes import conversation, detect
from graft.data.text_format import TextFormat
from graft.errors import GraftError
from graft.utils.hub import cached_if_silent


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
    left_out: list[str] = []
    samples = _samples(_tables(source, task, left_out), source, need_answers, task, unread)
    if left_out and unread is not None:
        unread.setdefault(source.path, []).extend(left_out)
    return samples


def read_as_found(source: SourceConfig) -> tuple[list[Sample], bool]:
    """Return all rows of a source, and whether they are pairs of a preferred and a rejected answer (else they are conversations).

    The columns of the first row decide. Raises the same errors as `read`.
    """
    tables = _tables(source, "causal")
    first = next(tables)
    pairs = bool(first.rows) and all(name in {*first.rows[0], *source.fields} for name in SIDES)
    task = "preference" if pairs else "causal"
    return _samples(itertools.chain([first], tables), source, True, task), pairs


def text_format(source: SourceConfig) -> TextFormat:
    """Return how the source's files of text are written."""
    return TextFormat(source.encoding, source.delimiter, source.quotes, tuple(source.columns))


class Table(NamedTuple):
    """The rows of one file or of a data set on the hub."""

    name: str
    rows: list[Row]


def _tables(source: SourceConfig, task: str, left_out: list[str] | None = None) -> Iterator[Table]:
    """Yield the tables of a source one by one, up to the source's limit of rows."""
    files, left = local_files(source, left_out), source.limit
    written = text_format(source)
    if files is None and written != TextFormat():
        raise GraftError(
            f"{source.path} is no file, so encoding, delimiter, quotes and columns have no effect: remove them"
        )
    if files is None:
        yield Table(source.path, _hub_rows(source, task)[:left])
    for file in files or ():
        if left == 0:
            break
        table = Table(str(file), read_rows(file, written)[:left])
        left = None if left is None else left - len(table.rows)
        yield table


def _samples(
    tables: Iterable[Table],
    source: SourceConfig,
    need_answers: bool,
    task: str,
    unread: dict[str, list[str]] | None = None,
) -> list[Sample]:
    samples: list[Sample] = []
    columns: list[str] = []
    first: tuple[str, tuple[str, ...]] | None = None
    for table in tables:
        if not table.rows:
            continue
        shape, found, unread_here = _of_table(table, source, need_answers, task)
        samples += found
        columns += unread_here
        first = first or (table.name, shape)
        if shape != first[1]:
            raise GraftError(
                f"{source.path} holds unlike files: {first[0]} has {', '.join(first[1])}, but {table.name} has {', '.join(shape)}. "
                "Name the files that belong together, in a list if there are several kinds"
            )
    if columns and unread is not None:
        unread[source.path] = list(dict.fromkeys(columns))
    if not samples:
        raise GraftError(f"{source.path} holds no rows")
    return samples


def _of_table(
    table: Table, source: SourceConfig, need_answers: bool, task: str
) -> tuple[tuple[str, ...], list[Sample], list[str]]:
    """Return the columns that tell the shape of a table, its samples, and the columns that nothing reads."""
    name, rows = table
    rows = [{column: value for column, value in row.items() if column not in source.ignore} for row in rows]
    columns = list(dict.fromkeys(column for row in rows for column in row))  # of any row, in the order of appearance
    for theirs in source.fields.values():
        if theirs not in columns:
            raise GraftError(
                f"{name}: `fields` names the column '{theirs}', but the data have no such column; they have {', '.join(columns)}"
            )
    fields = source.renames(columns) if isinstance(source, GivenSource) else source.fields
    columns = list(dict.fromkeys([*columns, *fields]))
    try:
        shape, to_sample = _converter(columns, source, name, need_answers, task)
    except GraftError as error:
        settable = not isinstance(source, GivenSource)
        hint = hint_for(name, columns) if settable and file_type(Path(name)) in (".csv", ".tsv") else ""
        raise GraftError(f"{error}{_renaming(source, columns, task)}{hint}") from None
    samples, seen = [], Seen(set(fields.values()))
    for number, row in enumerate(rows, start=1):
        renamed = {**row, **{ours: row.get(theirs) for ours, theirs in fields.items()}}
        try:
            samples.append(to_sample(TrackedRow(renamed, seen), number))
        except RowError as error:
            raise GraftError(f"{name}, row {number}, {error}") from None
    return shape, samples, check_unread(name, rows, seen, source.ignore, () if need_answers else MASKING)


def _renaming(source: SourceConfig, columns: list[str], task: str) -> str:
    """Return how columns are renamed where the source was named; nothing where they cannot be."""
    theirs = columns[0] if columns else "COLUMN"
    ours = {"preference": "chosen", "classification": "text", "regression": "text"}.get(task, "instruction")
    if not isinstance(source, GivenSource):
        return (
            "\nRename columns with `fields`, from the expected name to the name in the data, e.g. "
            f"fields: {{{ours}: {theirs}}}"
        )
    return (
        f"\nRename columns with {source.option} EXPECTED=COLUMN, e.g. {source.option} {ours}={theirs}"
        if source.option
        else ""
    )


def _converter(
    columns: list[str], source: SourceConfig, name: str, need_answers: bool, task: str
) -> tuple[tuple[str, ...], Callable[[Mapping[str, Any], int], Sample]]:
    """Return the columns that tell the shape, and the function that turns a row and its number into a sample."""
    if task == "preference" and LABEL in columns and not all(name in columns for name in SIDES):
        marked = detect(columns, source.format, name, need_answers)
        return (*marked.columns[0], LABEL), lambda row, number: marked_sample(row, marked, name, number)
    if task == "preference":
        check_pairs(columns, source.format, name)

        def pair_sample(row: Mapping[str, Any], number: int) -> Sample:
            prompt, chosen, rejected = pair(row)
            return Sample((*prompt, *chosen), name, number, (*prompt, *rejected), len(prompt))

        return SIDES, pair_sample
    if task in LABELS:
        labelled = labelled_shape(columns, source.format, name, task, need_answers)
        return labelled.columns[0], lambda row, number: Sample(tuple(labelled.convert(row, need_answers)), name, number)
    if task == "causal" and source.format == "auto" and all(column in columns for column in ROLLOUT_COLUMNS):
        return ROLLOUT_COLUMNS, lambda row, number: rollout_sample(row, name, number)
    shape = detect(columns, source.format, name, need_answers)
    return shape.columns[0], lambda row, number: Sample(tuple(conversation(shape, row, need_answers)), name, number)


def _hub_rows(source: SourceConfig, task: str) -> list[Row]:
    import datasets
    from datasets.exceptions import DatasetsError

    try:
        with cached_if_silent():
            loaded = datasets.load_dataset(source.path, source.name, split=source.split or "train")
    except (OSError, ValueError, DatasetsError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        hint = near(Path(source.path))
        raise GraftError(
            f"{source.path}: there is no such file, and loading it from the hub failed: {reason}{hint}"
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

"""Find the rows of a test set in a folder of sets, in one file, or on the hub."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast

from graft.data import file_readers
from graft.data.file_readers import EXPECTED, Row, file_type
from graft.errors import GraftError, did_you_mean
from graft.utils.hub import cached_if_silent


@dataclass(frozen=True)
class Hub:
    """A data set on the Hugging Face hub."""

    path: str
    split: str
    """The split, as `datasets` expects it: "test", or "train+test"."""
    name: str | None = None
    """The configuration of the data set."""
    revision: str | None = None
    """A branch to use if the main one cannot be read. "refs/convert/parquet" is the hub's own copy as Parquet files."""


def find(folder: Path, files: Sequence[str]) -> Path | None:
    """Return the first of these files in a folder of sets. The folder may also be that of the set itself.

    For "gsm8k/test.json", both the folder that holds gsm8k/ and the folder gsm8k/ are accepted.
    """
    inner = [file.partition("/")[2] for file in files if file.partition("/")[0] == folder.name]
    return next((folder / file for file in (*files, *filter(None, inner)) if (folder / file).is_file()), None)


def read_rows(
    task: str,
    data: str | Path | None,
    files: Sequence[str],
    hub: Hub | None,
    reader: Callable[[Path], list[Row]] = file_readers.read_rows,
) -> tuple[str, list[Row]]:
    """Read the rows of a test set. Returns (name of the source, rows).

    data: a file, a folder in which `files` are looked for, or None for the hub. Raises `GraftError` for a folder without any
    of the files, for a set that is not on the hub or cannot be read from it, and for a source without rows.
    """
    if data is None:
        if hub is None:
            raise GraftError(f"'{task}' is not on the hub: name its folder or file with --data")
        source, found = f"{hub.path} ({hub.split})", _hub_rows(task, hub)
    else:
        path = _file(task, Path(data).expanduser(), files)
        source, found = str(path), reader(path)
    if not found:
        raise GraftError(f"{source} holds no rows")
    return source, found


def _hub_rows(task: str, hub: Hub) -> list[Row]:
    import datasets
    from datasets.exceptions import DatasetsError

    try:
        with cached_if_silent():
            found = datasets.load_dataset(hub.path, hub.name, split=hub.split, revision=hub.revision)
    except (OSError, ValueError, RuntimeError, DatasetsError) as error:
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise GraftError(
            f"'{task}' cannot be read from the hub ({hub.path}, {hub.split}): {reason}. Name its folder or file with --data"
        ) from error
    return [cast(Row, row) for row in found]


def _file(task: str, path: Path, files: Sequence[str]) -> Path:
    if path.is_file():
        if file_type(path) is None:
            raise GraftError(f"{path}: unknown kind of file '{path.suffix}', expected {EXPECTED}")
        return path
    if not path.is_dir():
        raise GraftError(f"there is no file or folder {path} with the questions of '{task}'")
    found = find(path, files)
    if found is None:
        near = did_you_mean(files[0].partition("/")[0], sorted(entry.name for entry in path.iterdir()))
        raise GraftError(f"{path} does not hold '{task}': looked for {', '.join(files)}.{near}")
    return found

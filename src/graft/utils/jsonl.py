"""JSON files that may be read while another process writes them: files of one object per line, and files of one object."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from graft.errors import GraftError
from graft.utils.files import explain_write_errors, to_json, write_text_atomic


class JsonLines:
    """A file with one JSON object per line. A line that a killed process left unfinished is ignored, and cut off by the next `append`."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)

    def append(self, *records: Mapping[str, Any]) -> None:
        """Add a line for each record; readers see them at once. Raises `GraftError` if the disk is full; the file then stays as it was."""
        line = "".join(to_json(record) + "\n" for record in records).encode()
        with explain_write_errors(self.path), open(self.path, "ab+", buffering=0) as file:
            end = _end_of_lines(file)
            file.truncate(end)
            try:
                written = file.write(line)
                while written < len(line):
                    written += file.write(line[written:])
            except OSError:
                file.truncate(end)
                raise

    def read(self) -> list[dict[str, Any]]:
        """Return all finished lines (none if there is no file). Raises `GraftError` for a line that is not JSON."""
        if not self.path.exists():
            return []
        lines = self.path.read_bytes().split(b"\n")[:-1]
        return [self._parsed(line, number) for number, line in enumerate(lines, start=1)]

    def _parsed(self, line: bytes, number: int) -> dict[str, Any]:
        try:
            return json.loads(line)
        except ValueError as error:
            raise GraftError(f"{self.path}:{number} is not a line of JSON: {error}") from error

    def keep(self, wanted: Callable[[dict[str, Any]], bool]) -> None:
        """Keep only the lines that are wanted, atomically. A resumed run drops the lines after its checkpoint this way."""
        if self.path.exists():
            write_text_atomic(self.path, "".join(to_json(record) + "\n" for record in self.read() if wanted(record)))

    def sync(self) -> None:
        """Flush the appended lines to the disk, so that they survive a power cut."""
        if self.path.exists():
            with explain_write_errors(self.path), open(self.path, "rb") as file:
                os.fsync(file.fileno())


def _end_of_lines(file: Any) -> int:
    """Return the position after the last finished line. The file is searched backwards for a line end, in blocks of 4096 bytes."""
    end = file.seek(0, os.SEEK_END)
    while end:
        start = max(0, end - 4096)
        file.seek(start)
        found = file.read(end - start).rfind(b"\n")
        if found >= 0:
            return start + found + 1
        end = start
    return 0


def read_json(path: str | Path) -> dict[str, Any]:
    """Read a JSON object. Raises `GraftError` if the file holds anything else."""
    try:
        value = json.loads(Path(path).read_text(encoding="utf-8"))
    except ValueError as error:
        raise GraftError(f"{path} is not a JSON file: {error}") from error
    if not isinstance(value, dict):
        raise GraftError(f"{path} must hold a JSON object; it holds a {type(value).__name__}")
    return value

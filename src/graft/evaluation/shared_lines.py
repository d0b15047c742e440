"""A file of answers that several ranks fill: each writes to a part of its own (answers.jsonl.1), which the first rank takes over.

Answers are never sent, so a rank that dies loses none: whoever opens the file next, in whatever number of ranks, takes the parts over.
All ranks see one folder.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from graft.distributed.group import Group
from graft.errors import GraftError
from graft.utils.files import explain_write_errors, to_json
from graft.utils.jsonl import JsonLines


def need_shared(file: Path, place: Path, group: Group) -> None:
    """Raise `GraftError` on all ranks unless each sees a file that the first one wrote. place: what the message names."""
    with group.agreed():
        if not file.is_file():
            raise GraftError(
                f"process {group.rank} does not see {place}, to which process 0 writes: all need one shared folder"
            )


class SharedLines:
    """The lines of a file and of its parts."""

    def __init__(self, path: Path, group: Group) -> None:
        self.path = path
        self._own = JsonLines(path if group.leads else path.with_name(f"{path.name}.{group.rank}"))

    def append(self, record: Mapping[str, Any]) -> None:
        """Add a line to the part of this rank."""
        self._own.append(record)

    def sync(self) -> None:
        """Flush the lines of this rank to the disk."""
        self._own.sync()

    def take_over(self) -> list[dict[str, Any]]:
        """On the first rank: move all parts into the file; return the lines that it then holds."""
        whole = JsonLines(self.path)
        lines = whole.read()
        parts = self._parts()
        # A process that was killed here has moved some already.
        known = {to_json(line) for line in lines} if parts else set()
        for part in parts:
            moved = [line for line in JsonLines(part).read() if to_json(line) not in known]
            if moved:
                whole.append(*moved)
                whole.sync()
            lines += moved
            part.unlink()
        return lines

    def discard(self) -> None:
        """Delete the file and its parts."""
        with explain_write_errors(self.path):
            for path in (self.path, *self._parts()):
                path.unlink(missing_ok=True)

    def _parts(self) -> list[Path]:
        found = self.path.parent.glob(f"{self.path.name}.*")
        return sorted(path for path in found if path.name.removeprefix(f"{self.path.name}.").isdecimal())

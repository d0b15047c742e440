"""A file of answers that several ranks fill: each writes to a part of its own (answers.jsonl.1), which the first rank takes over.

Answers are never sent, so a rank that dies loses none: whoever opens the file next, in whatever number of ranks, takes the parts over.
All ranks see one folder.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from graft.distributed.group import Group
from graft.utils.files import explain_write_errors, to_json
from graft.utils.jsonl import JsonLines


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
        known = (
            {to_json(line) for line in lines} if parts else set()
        )  # a process that was killed here has moved some already
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

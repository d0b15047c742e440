"""The answers of `graft predict`, written as they come.

To stdout goes each answer as soon as all before it are there. A file gets its answers in FILE.partial, in the order in which they come, and
its own name at the end, in the order of the prompts. The same command continues a partial file; answers of another base, adapter, template
or setting are an error, and nothing is deleted unless the user asks for it. Of several ranks, each has the answers that it gave itself,
and the first one has all of them in the end.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from graft.distributed.group import ALONE, Group
from graft.errors import GraftError
from graft.evaluation.shared_lines import SharedLines, need_shared
from graft.utils.files import explain_write_errors, to_json, write_text_atomic


class Predictions:
    """The records of all prompts, by number from 0. Use it as a context manager; `finish` ends it."""

    def __init__(
        self, out: Path | None, about: Mapping[str, Any], total: int, *, overwrite: bool = False, show: bool = True,
        group: Group = ALONE,
    ) -> None:  # fmt: skip
        """about: what the answers belong to, as JSON values. show: without a file, print each answer. group: several ranks need a file.

        Raises `GraftError` for a partial file of something else.
        """
        self._out, self._total, self._shows = out, total, show and out is None
        self.records: dict[int, dict[str, Any]] = {}
        self._shown = self.kept = 0
        self._group, self._lines, self._lock = group, None, None
        if out is None:
            assert group.size == 1
            return
        partial = out.with_name(out.name + ".partial")
        self._lines = SharedLines(partial, group)
        with group.agreed():
            if group.leads:
                self._lock = FileLock(str(out.with_name(f".{out.name}.lock")))
                _lock(self._lock, out)
                try:
                    self._continue(partial, self._lines, dict(about), overwrite)
                except BaseException:
                    self._release()
                    raise
        need_shared(partial, partial, group)
        self.records |= {number: {} for number in group.tell([*self.records]) if not group.leads}
        self.kept = len(self.records)

    def _continue(self, partial: Path, lines: SharedLines, about: dict[str, Any], overwrite: bool) -> None:
        if overwrite:
            lines.discard()
        saved = lines.take_over()
        if not saved:
            lines.append(about)
            return
        if saved[0] != about:
            differ = [key for key in about if saved[0].get(key) != about[key]]
            raise GraftError(
                f"{partial} holds answers of another prediction ({', '.join(differ) or 'other keys'} differ): name another file, or start "
                "again with --overwrite"
            )
        self.records = {record.pop("number"): record for record in saved[1:]}

    def __enter__(self) -> Predictions:
        self._show()
        return self

    def __exit__(self, *error: object) -> None:
        self._release()

    @property
    def missing(self) -> list[int]:
        """The numbers of the prompts without an answer."""
        return [number for number in range(self._total) if number not in self.records]

    def add(self, number: int, record: dict[str, Any]) -> int:
        """Write the record of a prompt. Returns how many there are by now, those of other ranks counted."""
        self.records[number] = record
        if self._lines is not None:
            self._lines.append({"number": number, **record})
        self._show()
        return len(self.records) if self._group.size == 1 else self.kept + self._group.tally(f"answers/{self._out}", 1)

    def finish(self) -> list[dict[str, Any]]:
        """Give the file its name, with the records in the order of the prompts. The first rank gets them, the others none."""
        self._group.wait()
        with self._group.agreed():
            if not self._group.leads:
                return []
            if self._group.size > 1 and self._lines is not None:
                self.records |= {record.pop("number"): record for record in self._lines.take_over()[1:]}
            ordered = [self.records[number] for number in range(self._total)]
            if self._out is not None and self._lines is not None:
                write_text_atomic(self._out, "".join(to_json(record) + "\n" for record in ordered))
                self._lines.discard()
            return ordered

    def _show(self) -> None:
        if not self._shows:
            return
        for number in self._next():
            sys.stdout.write(to_json(self.records[number]) + "\n")
            sys.stdout.flush()

    def _next(self) -> Iterator[int]:
        while self._shown in self.records:
            yield self._shown
            self._shown += 1

    def _release(self) -> None:
        if self._lock is not None and self._lock.is_locked:
            Path(self._lock.lock_file).unlink(missing_ok=True)
            self._lock.release()


def _lock(lock: FileLock, out: Path) -> None:
    with explain_write_errors(out):
        out.parent.mkdir(parents=True, exist_ok=True)
        try:
            lock.acquire(timeout=0)
        except Timeout:
            raise GraftError(f"another process is writing {out}: wait for it, or name another file") from None

"""The answers of `graft predict`, written as they come.

To stdout goes each answer as soon as all before it are there. A file gets its answers in FILE.partial, in the order in which they come, and
its own name at the end, in the order of the prompts. The same command continues a partial file; answers of another base, adapter, template
or setting are an error, and nothing is deleted unless the user asks for it.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from graft.errors import GraftError
from graft.utils.files import explain_write_errors, to_json, write_text_atomic
from graft.utils.jsonl import JsonLines


class Predictions:
    """The records of all prompts, by number from 0. Use it as a context manager; `finish` ends it."""

    def __init__(
        self, out: Path | None, about: Mapping[str, Any], total: int, *, overwrite: bool = False, show: bool = True
    ) -> None:
        """about: what the answers belong to, as JSON values. show: without a file, print each answer.

        Raises `GraftError` for a partial file of something else.
        """
        self._out, self._total, self._shows = out, total, show and out is None
        self.records: dict[int, dict[str, Any]] = {}
        self._shown = 0
        self._lines = self._lock = None
        if out is None:
            return
        partial = out.with_name(out.name + ".partial")
        self._lock = FileLock(str(out.with_name(f".{out.name}.lock")))
        with explain_write_errors(out):
            out.parent.mkdir(parents=True, exist_ok=True)
            try:
                self._lock.acquire(timeout=0)
            except Timeout:
                raise GraftError(f"another process is writing {out}: wait for it, or name another file") from None
        self._lines = JsonLines(partial)
        try:
            self._continue(partial, dict(about), overwrite)
        except BaseException:
            self._release()
            raise

    def _continue(self, partial: Path, about: dict[str, Any], overwrite: bool) -> None:
        assert self._lines is not None
        if overwrite:
            with explain_write_errors(partial):
                partial.unlink(missing_ok=True)
        saved = self._lines.read()
        if not saved:
            self._lines.append(about)
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

    def add(self, number: int, record: dict[str, Any]) -> None:
        """Write the record of a prompt."""
        self.records[number] = record
        if self._lines is not None:
            self._lines.append({"number": number, **record})
        self._show()

    def finish(self) -> list[dict[str, Any]]:
        """Give the file its name, with the records in the order of the prompts; return them."""
        ordered = [self.records[number] for number in range(self._total)]
        if self._out is not None and self._lines is not None:
            write_text_atomic(self._out, "".join(to_json(record) + "\n" for record in ordered))
            self._lines.path.unlink(missing_ok=True)
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

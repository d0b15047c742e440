"""answers.jsonl of one evaluation: appended while answers come, so that a killed evaluation goes on where it was.

evaluation.json beside it says, before the first answer, what the answers belong to: protocol, base, contestants. Answers are
taken up again only where all of that is the same, to the weights of the adapters, and where their questions are those that
are asked now. More rows or more adapters than before are no obstacle; anything else is refused, and nothing is thrown away
unless the user says so. While an evaluation runs it holds the lock of its folder: two would mix their answers.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from graft.errors import GraftError
from graft.utils.files import explained, write_json_atomic
from graft.utils.jsonl import JsonLines, read_json

ABOUT, ANSWERS, RESULT, LOCK = "evaluation.json", "answers.jsonl", "result.json", ".lock"
SYNC_SECONDS = 1.0
"""Answers of at most this time are lost in a power cut; a killed process loses none."""

Key = tuple[str, int]
"""Contestant, and number of the question from 1."""
Questions = Sequence[tuple[str, str]]
"""(question, expected answer), in their order."""

_NEEDED = ("contestant", "number", "question", "expected", "answer", "extracted", "outcome", "ended", "tokens")
_WAY_OUT = "Name another folder with --out, or begin it anew with --overwrite"


class Journal:
    """The answers of one evaluation, those of an interrupted process included: `with Journal(...) as journal: ...`."""

    def __init__(
        self, folder: Path | None, about: Mapping[str, Any], questions: Questions, *, overwrite: bool = False
    ) -> None:
        """folder: None keeps answers in memory only. about: what the answers belong to, with `contestants` by name.

        Raises `GraftError` for a folder with answers that belong to something else, for one that another process writes to,
        and for one that cannot be written.
        """
        self.folder = folder
        self.answers: dict[Key, dict[str, Any]] = {}
        self.kept = 0
        """Answers that were there already."""
        self._begun = self._synced = time.monotonic()
        self._lines = self._lock = None
        if folder is not None:
            self._lock = _locked(folder)
            try:
                self._take_up(folder, about, questions, overwrite)
            except BaseException:
                self._lock.release()
                raise
            self._lines = JsonLines(folder / ANSWERS)

    def _take_up(self, folder: Path, about: Mapping[str, Any], questions: Questions, overwrite: bool) -> None:
        """Read the answers that are there, unless they are to go, and note what all of them belong to."""
        if overwrite:
            with explained(folder):
                for name in (ABOUT, ANSWERS, RESULT):
                    (folder / name).unlink(missing_ok=True)
        _check_about(folder, about)
        for number, line in enumerate(_lines(folder / ANSWERS), start=1):
            _check_line(f"{folder / ANSWERS}:{number}", line, about, questions)
            self.answers[line["contestant"], line["number"]] = line
        write_json_atomic(folder / ABOUT, about)
        with explained(folder):
            (folder / RESULT).unlink(missing_ok=True)
        self.kept = len(self.answers)

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, *error: object) -> None:
        if self._lock is not None:
            self._lock.release()

    @property
    def seconds(self) -> float:
        """Since the journal was opened."""
        return time.monotonic() - self._begun

    def append(self, line: dict[str, Any]) -> None:
        """Keep an answer."""
        self.answers[line["contestant"], line["number"]] = line
        if self._lines is not None:
            self._lines.append(line)
            if time.monotonic() - self._synced > SYNC_SECONDS:
                self.sync()

    def sync(self) -> None:
        """To the disk itself."""
        if self._lines is not None:
            self._lines.sync()
            self._synced = time.monotonic()

    def finish(self, result: Mapping[str, Any]) -> None:
        """Write result.json, which says that all is answered."""
        if self.folder is not None:
            write_json_atomic(self.folder / RESULT, result)


def read_result(folder: Path) -> dict[str, Any]:
    """result.json of a folder. Raises `GraftError` for one that is damaged, or that another version of Graft wrote."""
    path = folder / RESULT
    result = read_json(path)
    lacking = [name for name in ("task", "protocol", "protocol_hash", "results") if name not in result]
    if not lacking:
        lacking = [] if isinstance(result["protocol"], Mapping) and "name" in result["protocol"] else ["protocol.name"]
        lacking += [
            f"results.{name}" for name in ("name", "total") if any(name not in each for each in result["results"])
        ]
    if lacking or not result["results"]:
        raise GraftError(
            f"{path} is not a result that this version of Graft reads: it has no {', '.join(lacking) or 'contestants'}. "
            "Evaluate again with --overwrite"
        )
    return result


def _locked(folder: Path) -> FileLock:
    """The lock of a folder, which is made where it is not there."""
    lock = FileLock(folder / LOCK)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock.acquire(timeout=0)
    except Timeout as error:
        raise GraftError(
            f"another evaluation is writing to {folder}: wait until it ends, or name another folder with --out"
        ) from error
    except OSError as error:
        raise GraftError(
            f"results cannot be written to {folder}: {error.strerror or error}. Name another folder with --out"
        ) from error
    return lock


def _lines(path: Path) -> list[dict[str, Any]]:
    try:
        return JsonLines(path).read()
    except GraftError as error:
        raise GraftError(f"{error}. Delete that line, and its question is asked again. {_WAY_OUT}") from error


def _check_about(folder: Path, about: Mapping[str, Any]) -> None:
    path = folder / ABOUT
    if not path.is_file():
        if (folder / ANSWERS).exists():
            raise GraftError(f"{folder} holds answers, but no {ABOUT} that says what they belong to. {_WAY_OUT}")
        return
    before = {"engine": "graft", **read_json(path)}
    for name in ("task", "protocol_hash", "base", "dtype", "engine"):
        if before.get(name) != about[name]:
            raise GraftError(
                f"{folder / ANSWERS} belongs to another {name.replace('_', ' ')}: {before.get(name)}, now {about[name]}. {_WAY_OUT}"
            )
    for name, candidate in before.get("contestants", {}).items():
        now = about["contestants"].get(name)
        if now is None:
            raise GraftError(
                f"{folder / ANSWERS} holds answers of '{name}', which is not among those asked. {_WAY_OUT}"
            )
        for what in ("digest", "template"):
            if candidate.get(what) != now[what]:
                words = "weights" if what == "digest" else what
                raise GraftError(
                    f"{folder / ANSWERS} holds answers of '{name}' with other {words} ({candidate.get(what)}, now {now[what]}). {_WAY_OUT}"
                )


def _check_line(where: str, line: Any, about: Mapping[str, Any], questions: Questions) -> None:
    lacking = [name for name in _NEEDED if not isinstance(line, Mapping) or name not in line]
    if lacking:
        raise GraftError(
            f"{where} is not an answer of this version of Graft: it has no {', '.join(lacking)}. Delete that line, and its "
            f"question is asked again. {_WAY_OUT}"
        )
    if line["contestant"] not in about["contestants"]:
        raise GraftError(f"{where} is an answer of '{line['contestant']}', which is not among those asked. {_WAY_OUT}")
    number = line["number"]
    if number > len(questions):
        raise GraftError(
            f"{where} answers question {number}, but only {len(questions)} are asked now: ask as many. {_WAY_OUT}"
        )
    if (line["question"], line["expected"]) != questions[number - 1]:
        raise GraftError(f"{where} answers another question than is number {number} now. {_WAY_OUT}")

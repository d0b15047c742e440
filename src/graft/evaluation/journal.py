"""The answers of one evaluation in a folder. Each is appended as it comes, so that a killed evaluation can continue.

- answers.jsonl holds the answers, one per line.
- evaluation.json is written before the first answer. It says what the answers belong to: protocol, base and candidates.
- result.json is written at the end.

Saved answers are used again only if all that evaluation.json says is the same, including the digests of the adapters'
weights, and if their questions are those asked now. More rows or more adapters than before are allowed. Anything else is an
error, and nothing is deleted unless the user asks for it. A running evaluation locks its folder, because two would mix their
answers. Of several ranks, each has the answers that it gave itself, and the first one has all of them in the end (`complete`).
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from graft.distributed.group import ALONE, Group
from graft.errors import GraftError
from graft.evaluation.shared_lines import SharedLines, need_shared
from graft.utils.files import explain_write_errors, write_json_atomic
from graft.utils.jsonl import read_json

ABOUT, ANSWERS, RESULT, LOCK = "evaluation.json", "answers.jsonl", "result.json", ".lock"
SYNC_SECONDS = 1.0
"""Seconds between two flushes to the disk. A power cut loses the answers since the last one; a killed process loses none."""

Key = tuple[str, int]
"""Name of the candidate, and number of the question from 1."""
Questions = Sequence[tuple[str, str]]
"""(question, expected answer) in the order of the data."""

_NEEDED = ("contestant", "number", "question", "expected", "answer", "extracted", "outcome", "ended", "tokens")
_WAY_OUT = "Name another folder with --out, or start again with --overwrite"


class Journal:
    """The answers of one evaluation, including those of an interrupted process. Use it as a context manager."""

    def __init__(
        self,
        folder: Path | None,
        about: Mapping[str, Any],
        questions: Questions,
        *,
        overwrite: bool = False,
        group: Group = ALONE,
    ) -> None:
        """folder: None keeps the answers in memory only, for one rank. about: what the answers belong to (`describe_evaluation`).

        Raises `GraftError` for a folder with answers of another evaluation, for a folder that another process writes to, and
        for a folder that cannot be written.
        """
        self.folder = folder
        self.answers: dict[Key, dict[str, Any]] = {}
        self.kept = 0
        """Number of answers that were saved before."""
        self._begun = self._synced = time.monotonic()
        self._group, self._lines, self._lock = group, None, None
        if folder is None:
            assert group.size == 1
            return
        self._lines = SharedLines(folder / ANSWERS, group)
        with group.agreed():
            if group.leads:
                self._lock = _locked(folder)
                try:
                    self._load_saved(folder, self._lines, about, questions, overwrite)
                except BaseException:
                    self._lock.release()
                    raise
        need_shared(folder / ABOUT, folder, group)
        self.answers |= {(name, number): {} for name, number in group.tell([*self.answers]) if not group.leads}
        self.kept = len(self.answers)
        self._tally = f"answers/{folder}"

    def _load_saved(
        self, folder: Path, lines: SharedLines, about: Mapping[str, Any], questions: Questions, overwrite: bool
    ) -> None:
        """Check and load the saved answers, or delete them with `overwrite`, and write evaluation.json."""
        if overwrite:
            lines.discard()
            with explain_write_errors(folder):
                for name in (ABOUT, RESULT):
                    (folder / name).unlink(missing_ok=True)
        _check_about(folder, about)
        for number, line in enumerate(_saved(lines), start=1):
            _check_line(f"{folder / ANSWERS}:{number}", line, about, questions)
            self.answers[line["contestant"], line["number"]] = line
        write_json_atomic(folder / ABOUT, about)
        with explain_write_errors(folder):
            (folder / RESULT).unlink(missing_ok=True)

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, *error: object) -> None:
        if self._lock is not None:
            self._lock.release()

    @property
    def seconds(self) -> float:
        """Seconds since the journal was opened."""
        return time.monotonic() - self._begun

    def append(self, line: dict[str, Any]) -> int:
        """Add an answer, in memory and in the folder. Returns how many there are by now, those of other ranks counted."""
        self.answers[line["contestant"], line["number"]] = line
        if self._lines is not None:
            self._lines.append(line)
            if time.monotonic() - self._synced > SYNC_SECONDS:
                self.sync()
        return len(self.answers) if self._group.size == 1 else self.kept + self._group.tally(self._tally, 1)

    def complete(self) -> None:
        """Flush the answers to the disk; the first rank then has those of all. Every rank calls this when it has no more to answer."""
        self.sync()
        self._group.wait()
        with self._group.agreed():
            if self._group.leads and self._group.size > 1 and self._lines is not None:
                self.answers |= {(line["contestant"], line["number"]): line for line in self._lines.take_over()}

    def sync(self) -> None:
        """Flush the answers to the disk."""
        if self._lines is not None:
            self._lines.sync()
            self._synced = time.monotonic()

    def finish(self, result: Mapping[str, Any]) -> None:
        """Write result.json, which also marks the evaluation as finished."""
        if self.folder is not None:
            write_json_atomic(self.folder / RESULT, result)


def read_result(folder: Path) -> dict[str, Any]:
    """Read result.json of a folder. Raises `GraftError` if it is damaged or was written by another version of Graft."""
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
            f"{path} is not a result that this version of Graft reads: it has no {', '.join(lacking) or 'candidates'}. "
            "Evaluate again with --overwrite"
        )
    return result


def _locked(folder: Path) -> FileLock:
    """Create the folder if needed and lock it."""
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


def _saved(lines: SharedLines) -> list[dict[str, Any]]:
    try:
        return lines.take_over()
    except GraftError as error:
        raise GraftError(f"{error}. Delete that line, and its question is asked again. {_WAY_OUT}") from error


def _check_about(folder: Path, about: Mapping[str, Any]) -> None:
    """Raise `GraftError` if the saved answers belong to another evaluation than `about` describes."""
    path = folder / ABOUT
    if not path.is_file():
        if (folder / ANSWERS).exists():
            raise GraftError(f"{folder} holds answers but no {ABOUT}, which says what they belong to. {_WAY_OUT}")
        return
    before = {"engine": "graft", **read_json(path)}  # older files name no engine
    for name in ("task", "protocol_hash", "base", "dtype", "engine"):
        if _without_place(before.get(name)) != _without_place(about[name]):
            raise GraftError(
                f"{folder / ANSWERS} belongs to another {name.replace('_', ' ')}: {before.get(name)}, now {about[name]}. {_WAY_OUT}"
            )
    for name, candidate in before.get("contestants", {}).items():
        now = about["contestants"].get(name)
        if now is None:
            raise GraftError(f"{folder / ANSWERS} holds answers of '{name}', which is not evaluated now. {_WAY_OUT}")
        for what in ("digest", "template"):
            if candidate.get(what) != now[what]:
                words = "weights" if what == "digest" else what
                raise GraftError(
                    f"{folder / ANSWERS} holds answers of '{name}' with other {words} ({candidate.get(what)}, now {now[what]}). {_WAY_OUT}"
                )


def _without_place(value: Any) -> Any:
    """A base without its name, which says where it lies: that may change, and its digest tells it from others."""
    return {key: each for key, each in value.items() if key != "model"} if isinstance(value, Mapping) else value


def _check_line(where: str, line: Any, about: Mapping[str, Any], questions: Questions) -> None:
    """Raise `GraftError` for a line that is not an answer to one of the questions by one of the candidates."""
    lacking = [name for name in _NEEDED if not isinstance(line, Mapping) or name not in line]
    if lacking:
        raise GraftError(
            f"{where} is not an answer of this version of Graft: it has no {', '.join(lacking)}. Delete that line, and its "
            f"question is asked again. {_WAY_OUT}"
        )
    if line["contestant"] not in about["contestants"]:
        raise GraftError(f"{where} is an answer of '{line['contestant']}', which is not evaluated now. {_WAY_OUT}")
    number = line["number"]
    if number > len(questions):
        raise GraftError(
            f"{where} answers question {number}, but only {len(questions)} are asked now: ask at least as many. {_WAY_OUT}"
        )
    if (line["question"], line["expected"]) != questions[number - 1]:
        raise GraftError(f"{where} answers another question than the one that is number {number} now. {_WAY_OUT}")

"""answers.jsonl of one evaluation: appended while answers come, so that a killed evaluation goes on where it was.

evaluation.json beside it says, before the first answer, what the answers belong to: protocol, base, contestants. Answers are
taken up again only where all of that is the same, to the weights of the adapters, and where their questions are those that
are asked now. More rows or more adapters than before are no obstacle; anything else is refused, and nothing is thrown away
unless the user says so.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from graft.errors import GraftError
from graft.files import explained, write_json_atomic
from graft.jsonl import JsonLines, read_json

ABOUT, ANSWERS, RESULT = "evaluation.json", "answers.jsonl", "result.json"
SYNC_SECONDS = 1.0
"""Answers of at most this time are lost in a power cut; a killed process loses none."""

Key = tuple[str, int]
"""Contestant, and number of the question from 1."""
Questions = Sequence[tuple[str, str]]
"""(question, expected answer), in their order."""

_WAY_OUT = "Name another folder with --out, or begin it anew with --overwrite"


class Journal:
    """The answers of one evaluation, those of an interrupted process included."""

    def __init__(
        self, folder: Path | None, about: Mapping[str, Any], questions: Questions, *, overwrite: bool = False
    ) -> None:
        """folder: None keeps answers in memory only. about: what the answers belong to, with `contestants` by name.

        Raises `GraftError` for a folder with answers that belong to something else.
        """
        self.answers: dict[Key, dict[str, Any]] = {}
        self._lines = None if folder is None else JsonLines(folder / ANSWERS)
        self._synced = time.monotonic()
        if folder is None:
            return
        with explained(folder):
            folder.mkdir(parents=True, exist_ok=True)
            if overwrite:
                for name in (ABOUT, ANSWERS, RESULT):
                    (folder / name).unlink(missing_ok=True)
        _check_about(folder, about)
        for number, line in enumerate(JsonLines(folder / ANSWERS).read(), start=1):
            _check_line(f"{folder / ANSWERS}:{number}", line, about, questions)
            self.answers[line["contestant"], line["number"]] = line
        write_json_atomic(folder / ABOUT, about)
        (folder / RESULT).unlink(missing_ok=True)
        self.kept = len(self.answers)

    kept = 0
    """Answers that were there already."""

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


def _check_about(folder: Path, about: Mapping[str, Any]) -> None:
    path = folder / ABOUT
    if not path.is_file():
        if (folder / ANSWERS).exists():
            raise GraftError(f"{folder} holds answers, but no {ABOUT} that says what they belong to. {_WAY_OUT}")
        return
    before = read_json(path)
    for name in ("task", "protocol_hash", "base", "dtype"):
        if before.get(name) != about[name]:
            raise GraftError(
                f"{folder / ANSWERS} belongs to another {name.replace('_', ' ')}: {before.get(name)}, now {about[name]}. {_WAY_OUT}"
            )
    for name, contestant in before["contestants"].items():
        now = about["contestants"].get(name)
        if now is None:
            raise GraftError(
                f"{folder / ANSWERS} holds answers of '{name}', which is not among those asked. {_WAY_OUT}"
            )
        for what in ("digest", "template"):
            if contestant.get(what) != now[what]:
                words = "weights" if what == "digest" else what
                raise GraftError(
                    f"{folder / ANSWERS} holds answers of '{name}' with other {words} ({contestant.get(what)}, now {now[what]}). {_WAY_OUT}"
                )


def _check_line(where: str, line: Mapping[str, Any], about: Mapping[str, Any], questions: Questions) -> None:
    if line["contestant"] not in about["contestants"]:
        raise GraftError(f"{where} is an answer of '{line['contestant']}', which is not among those asked. {_WAY_OUT}")
    number = line["number"]
    if number > len(questions):
        raise GraftError(
            f"{where} answers question {number}, but only {len(questions)} are asked now: ask as many. {_WAY_OUT}"
        )
    if (line["question"], line["expected"]) != questions[number - 1]:
        raise GraftError(f"{where} answers another question than is number {number} now. {_WAY_OUT}")

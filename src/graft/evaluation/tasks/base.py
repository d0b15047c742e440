"""What a benchmark is: where its rows are, how a row becomes a record, what kind of answer it wants.

A task file gives these facts and one raw example; everything else is here and in the protocols. A record holds the text
that a model is asked (for the LLM-Adapters sets the instruction as that paper published it, whichever source it comes
from), the question and choices it is made of, and the right answer.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from graft.data.file_readers import Row, rows_of
from graft.errors import GraftError
from graft.evaluation.tasks.rows import Hub, find, rows
from graft.evaluation.tasks.wording import Wording

AnswerKind = Literal["number", "letter", "label", "class", "score", "text"]
"""A number; the letter of a choice; a choice's label ("answer1"); a class's name; a number to be correlated; free text."""

RankForm = Literal["question", "continuation", "blank", "instruction"]
"""How ranking asks: as a question; by continuing the text; by filling the blank _ and continuing behind it; the instruction."""


@dataclass(frozen=True)
class Asked:
    """What a raw row says, before it is worded."""

    question: str
    gold: Any
    """The right answer; for choices the label. None or empty: the row has none."""
    choices: tuple[str, ...] = ()
    references: tuple[str, ...] = ()
    instruction: str | None = None
    """The whole text, where the row has it; else it is worded from the parts."""


def asked_in(instruction: str, gold: Any, wording: Wording | None) -> Asked:
    """The parts of a worded instruction; where it is worded otherwise, the whole is the question, without choices."""
    read = wording.read(instruction) if wording is not None else None
    question, choices = read if read is not None else (instruction, ())
    return Asked(question, gold, choices, instruction=instruction)


@dataclass(frozen=True)
class Record:
    """One question of a benchmark."""

    task: str
    source: str
    """File or hub name."""
    row: int
    """Row in that source, from 1."""
    instruction: str
    """What the model is asked."""
    question: str
    """The same without the listed choices."""
    choices: tuple[str, ...]
    """Texts of the choices; the labels are the first ones of the task's."""
    gold: str
    references: tuple[str, ...] = ()
    """All right texts, where answers are free text."""

    @property
    def where(self) -> str:
        """The row in words, for messages to the user."""
        return f"{self.source}, row {self.row}"


@dataclass(frozen=True)
class Task:
    """One benchmark."""

    name: str
    answer: AnswerKind
    convert: Callable[[Row], Asked]
    """An upstream row to its parts. A missing column may raise KeyError."""
    hub: Hub | None = None
    files: tuple[str, ...] = ()
    """Where a folder of sets may hold it, besides <name>/test.json."""
    wording: Wording | None = None
    """How choices stand in the instruction; None: the question is the instruction."""
    metrics: tuple[str, ...] = ()
    """Of classification: f1 (of the last class where there are two, else the mean over classes), matthews, pearson, spearman."""
    ranking: RankForm = "question"
    reader: Callable[[Path], list[Row]] = rows_of
    """Reads a file of an odd layout."""

    @property
    def labels(self) -> tuple[str, ...]:
        """The answers that a model can choose from; empty where answers are open."""
        return self.wording.labels if self.wording is not None else ()

    @property
    def places(self) -> tuple[str, ...]:
        """Files below a folder of sets, in the order in which they are looked for."""
        return (f"{self.name}/test.json", *self.files)

    def find(self, folder: str | Path) -> Path | None:
        """The task's file in a folder of sets, or None."""
        return find(Path(folder), self.places)

    def load(self, data: str | Path | None = None, limit: int | None = None) -> list[Record]:
        """The records: from a file, a folder of sets, or (None) the hub.

        Raises `GraftError` for a folder without the file (naming what was looked for), for missing columns, and for a row
        without an answer or with one that the task does not know, with the row number.
        """
        source, found = rows(self.name, data, self.places, self.hub, self.reader)
        if self.answer == "text":
            return _grouped([self.record(row, source, number) for number, row in enumerate(found, start=1)])[:limit]
        return [self.record(row, source, number) for number, row in enumerate(found[:limit], start=1)]

    def record(self, row: Mapping[str, Any], source: str, number: int) -> Record:
        """One row as a record."""
        where = f"{source}, row {number}"
        try:
            asked = self._published(row) if "instruction" in row else self.convert(dict(row))
        except (KeyError, IndexError, TypeError, AttributeError) as error:
            what = f"it has no column {error}" if isinstance(error, KeyError) else f"{type(error).__name__}, {error}"
            raise GraftError(
                f"{where} is not a row of '{self.name}': {what}; its columns are {', '.join(row)}"
            ) from error
        gold = "" if asked.gold is None else str(asked.gold).strip()
        if not gold:
            raise GraftError(f"{where}: there is no answer")
        if not asked.question.strip():
            raise GraftError(f"{where}: there is no question")
        self._check(gold, where)
        worded = self.wording.write(asked.question, asked.choices) if self.wording is not None else asked.question
        instruction = worded if asked.instruction is None else asked.instruction
        return Record(self.name, source, number, instruction, asked.question, asked.choices, gold, asked.references)

    def _published(self, row: Mapping[str, Any]) -> Asked:
        """A row of LLM-Adapters: {"instruction", "input", "output", "answer"}; `output` is another model's answer."""
        return asked_in(row["instruction"], row.get("answer"), self.wording)

    def _check(self, gold: str, where: str) -> None:
        """Raises `GraftError` for an answer that cannot be right or wrong."""
        if self.answer in ("number", "score"):
            if not _is_number(gold):
                raise GraftError(f"{where}: the answer of '{self.name}' is a number; given {gold!r}")
        elif self.labels and gold not in self.labels:
            raise GraftError(f"{where}: the answer of '{self.name}' is one of {', '.join(self.labels)}; given {gold!r}")


def _is_number(text: str) -> bool:
    try:
        return math.isfinite(float(text))
    except ValueError:
        return False


def _grouped(records: Sequence[Record]) -> list[Record]:
    """Free text has a row per reference: rows of one question become one record."""
    found: dict[str, Record] = {}
    for record in records:
        known = found.get(record.instruction)
        references = record.references if known is None else known.references + record.references
        found[record.instruction] = replace(known or record, references=references)
    return list(found.values())

"""The base classes of benchmarks: where the rows are, how a row becomes a record, and which kind of answer is right.

A task file states these facts and shows one raw example; everything else is here and in the protocols. A record holds the
text that a model is asked, the question and the choices in it, and the right answer. For the sets of LLM-Adapters the text is
the instruction that was published, whatever source the row comes from.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from graft.data import file_readers
from graft.data.file_readers import Row
from graft.errors import GraftError
from graft.evaluation.tasks.sources import Hub, find, read_rows
from graft.evaluation.tasks.wording import Wording

AnswerKind = Literal["number", "letter", "label", "class", "score", "text"]
"""number; letter of a choice; label of a choice ("answer1"); name of a class; score, a number to correlate; free text."""

RankForm = Literal["question", "continuation", "blank", "instruction"]
"""What comes before a choice in ranking: the question; the text to continue; the text up to a blank _; the instruction."""


@dataclass(frozen=True)
class ParsedRow:
    """The parts of a raw row."""

    question: str
    gold: Any
    """The right answer; for choices its label. None or empty: the row has no answer."""
    choices: tuple[str, ...] = ()
    references: tuple[str, ...] = ()
    instruction: str | None = None
    """The whole instruction, if the row has it; else it is written from the parts."""


def parse_instruction(instruction: str, gold: Any, wording: Wording | None) -> ParsedRow:
    """Split an instruction into its parts. If it does not fit the wording, all of it is the question, without choices."""
    read = wording.read(instruction) if wording is not None else None
    question, choices = read if read is not None else (instruction, ())
    return ParsedRow(question, gold, choices, instruction=instruction)


@dataclass(frozen=True)
class Record:
    """One question of a benchmark."""

    task: str
    source: str
    """File or hub name."""
    row: int
    """Row in that source, from 1."""
    instruction: str
    """The text that the model is asked."""
    question: str
    """The instruction without the listed choices."""
    choices: tuple[str, ...]
    """Texts of the choices. Their labels are the first ones of the task's labels."""
    gold: str
    references: tuple[str, ...] = ()
    """All right texts, if answers are free text."""

    @property
    def where(self) -> str:
        """Source and row, for messages to the user."""
        return f"{self.source}, row {self.row}"


@dataclass(frozen=True)
class Task:
    """One benchmark."""

    name: str
    answer: AnswerKind
    convert: Callable[[Row], ParsedRow]
    """Splits a row of the original data set into its parts. It may raise KeyError for a missing column."""
    hub: Hub | None = None
    files: tuple[str, ...] = ()
    """Paths in a folder of sets where the file may be, besides <name>/test.json."""
    wording: Wording | None = None
    """How the instruction lists the choices; None: the question is the instruction."""
    metrics: tuple[str, ...] = ()
    """Further scores: f1 (of the last class if there are two, else the mean over classes), matthews, pearson, spearman."""
    ranking: RankForm = "question"
    reader: Callable[[Path], list[Row]] = file_readers.read_rows
    """Reads the task's file; a task with an unusual format has its own."""

    @property
    def labels(self) -> tuple[str, ...]:
        """The answers that a model can choose from; empty if answers are open."""
        return self.wording.labels if self.wording is not None else ()

    @property
    def places(self) -> tuple[str, ...]:
        """Paths in a folder of sets, in the order in which they are looked for."""
        return (f"{self.name}/test.json", *self.files)

    def find(self, folder: str | Path) -> Path | None:
        """Return the task's file in a folder of sets, or None."""
        return find(Path(folder), self.places)

    def load(self, data: str | Path | None = None, limit: int | None = None) -> list[Record]:
        """Load the first `limit` records (None: all) from a file, a folder of sets, or, without `data`, the hub.

        Raises `GraftError` for a folder without the file (naming the paths that were tried), for missing columns, and, naming
        the row, for a row without an answer or with an answer that the task does not know.
        """
        source, found = read_rows(self.name, data, self.places, self.hub, self.reader)
        if self.answer == "text":
            return _group_references([self.record(row, source, number) for number, row in enumerate(found, start=1)])[
                :limit
            ]
        return [self.record(row, source, number) for number, row in enumerate(found[:limit], start=1)]

    def record(self, row: Mapping[str, Any], source: str, number: int) -> Record:
        """Turn one row into a record. Raises `GraftError` as `load` does."""
        where = f"{source}, row {number}"
        try:
            parsed = self._published(row) if "instruction" in row else self.convert(dict(row))
        except (KeyError, IndexError, TypeError, AttributeError) as error:
            # A row of another data set fails in `convert` in any of these ways.
            what = f"it has no column {error}" if isinstance(error, KeyError) else f"{type(error).__name__}, {error}"
            raise GraftError(
                f"{where} is not a row of '{self.name}': {what}; its columns are {', '.join(row)}"
            ) from error
        gold = "" if parsed.gold is None else str(parsed.gold).strip()
        if not gold:
            raise GraftError(f"{where}: there is no answer")
        if not parsed.question.strip():
            raise GraftError(f"{where}: there is no question")
        self._check(gold, where)
        worded = self.wording.write(parsed.question, parsed.choices) if self.wording is not None else parsed.question
        instruction = worded if parsed.instruction is None else parsed.instruction
        return Record(self.name, source, number, instruction, parsed.question, parsed.choices, gold, parsed.references)

    def _published(self, row: Mapping[str, Any]) -> ParsedRow:
        """Parse a row of LLM-Adapters, {"instruction", "input", "output", "answer"}. Its `output` is another model's answer."""
        return parse_instruction(row["instruction"], row.get("answer"), self.wording)

    def _check(self, gold: str, where: str) -> None:
        """Raise `GraftError` if the right answer is not of the task's kind."""
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


def _group_references(records: Sequence[Record]) -> list[Record]:
    """Join the rows of one question. Data sets of free text have a row per reference."""
    found: dict[str, Record] = {}
    for record in records:
        known = found.get(record.instruction)
        references = record.references if known is None else known.references + record.references
        found[record.instruction] = replace(known or record, references=references)
    return list(found.values())

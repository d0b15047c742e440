"""`rank`: which choice does the model find likeliest? No output is written, so nothing can be unextractable.

Each choice is scored by the log-likelihood of its text behind a context, summed over its tokens (`raw`), and by that sum
divided by the characters of the choice (`normalised`), as `acc` and `acc_norm` of lm-eval are (lm_eval/api/task.py). The raw
one decides `outcome`; the other stands beside it. The first of equals wins.

Contexts are plain, without a template: "Question: {question}\\nAnswer:" and " {choice}"; a text to be continued is its own
context; where a blank is to be filled, the context is the text up to and with the choice, and the rest is what is scored
(lm-eval's WinoGrande). Prompts of lm-eval differ from task to task: to compare with its tables, run lm-eval itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from graft.errors import GraftError
from graft.evaluation.protocols.base import Judgement, Protocol
from graft.evaluation.tasks.base import Record, Task


@dataclass(frozen=True)
class Continuation:
    """A text whose likelihood behind a context is wanted."""

    context: str
    text: str
    characters: int
    """By which the log-likelihood is normalised: those of the choice."""


@dataclass(frozen=True)
class Ranking:
    """What the likelihoods say."""

    raw: Judgement
    normalised: Judgement


@dataclass(frozen=True, kw_only=True)
class RankProtocol(Protocol):
    """Score choices by likelihood."""

    scoring: ClassVar[Literal["output", "likelihood"]] = "likelihood"

    def defines(self, task: Task) -> bool:
        return bool(task.labels)

    def content(self, task: Task) -> dict[str, Any]:
        return {
            "name": self.name,
            "version": self.version,
            "prompt": task.ranking,
            "scores": "sum of log-likelihoods; the same by characters of the choice",
            "labels": list(task.labels),
        }

    def continuations(self, task: Task, record: Record) -> list[Continuation]:
        """One per choice. Raises `GraftError` for a record whose choices could not be read from its instruction."""
        if len(record.choices) < 2:
            raise GraftError(f"{record.where}: its choices cannot be told apart, so they cannot be ranked")
        return [self._continuation(task, record, choice) for choice in record.choices]

    def _continuation(self, task: Task, record: Record, choice: str) -> Continuation:
        size = max(1, len(choice))
        if task.ranking == "continuation":
            return Continuation(record.question, f" {choice}", size)
        if task.ranking == "instruction":
            return Continuation(f"{record.instruction}\nAnswer:", f" {choice}", size)
        if task.ranking == "question":
            return Continuation(f"Question: {record.question}\nAnswer:", f" {choice}", size)
        before, blank, behind = record.question.partition("_")
        if not blank or not behind.strip():
            raise GraftError(f"{record.where}: there is no blank _ with words behind it")
        return Continuation(before + choice, f" {behind.strip()}", size)

    def rank(self, task: Task, record: Record, likelihoods: Sequence[float | None]) -> Ranking:
        """likelihoods: log-likelihood of each continuation in nats; None where it does not fit into the context."""
        sizes = [continuation.characters for continuation in self.continuations(task, record)]
        known = [value for value in likelihoods if value is not None]
        if len(known) < len(likelihoods):
            none = Judgement(None, "no_room")
            return Ranking(none, none)
        return Ranking(
            _judged(task, record, known),
            _judged(task, record, [value / size for value, size in zip(known, sizes, strict=True)]),
        )


def _judged(task: Task, record: Record, scores: Sequence[float]) -> Judgement:
    chosen = task.labels[max(range(len(scores)), key=scores.__getitem__)]
    return Judgement(chosen, "correct" if chosen == record.gold else "wrong")


PROTOCOL = RankProtocol(name="rank", version=1)

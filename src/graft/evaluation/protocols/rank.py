"""`rank`: take the choice that the model finds likeliest. No text is generated, so no answer is unextractable.

Each choice is scored by the log-likelihood of its text given a context, summed over its tokens (`raw`), and by that sum
divided by the number of characters of the choice (`normalised`), as lm-eval does for `acc` and `acc_norm`
(lm_eval/api/task.py). The raw score decides the outcome; the result holds both. The first of equal choices wins.

Contexts use no template. There are three forms:

- A question: the context is "Question: {question}\\nAnswer:", the text " {choice}".
- A text to continue: the context is this text.
- A text with a blank: the context is the text up to the blank and the choice, and the rest is scored (as in lm-eval's
  WinoGrande). "The cup broke because _ was thin." with the choice "it" scores " was thin." after "The cup broke because it".

lm-eval's prompts differ from task to task. To compare with its tables, run lm-eval itself.
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
    """A context and the text to score after it."""

    context: str
    text: str
    characters: int
    """Characters of the choice, by which the normalised log-likelihood is divided."""


@dataclass(frozen=True)
class Ranking:
    """The judgements on the choice of highest log-likelihood, and of highest log-likelihood per character."""

    raw: Judgement
    normalised: Judgement


@dataclass(frozen=True, kw_only=True)
class RankProtocol(Protocol):
    """A protocol that scores choices by likelihood."""

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
        """Return one continuation per choice. Raises `GraftError` if the choices cannot be read from the instruction."""
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
        before, blank, after = record.question.partition("_")
        if not blank or not after.strip():
            raise GraftError(f"{record.where}: there is no blank _ with words after it")
        return Continuation(before + choice, f" {after.strip()}", size)

    def rank(self, task: Task, record: Record, likelihoods: Sequence[float | None]) -> Ranking:
        """Choose by likelihood and judge the choice.

        likelihoods: log-likelihood of each continuation in nats; None if it does not fit into the context.
        """
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

"""What a protocol is: how a benchmark's question is asked, how tokens are chosen, what of the output is compared.

A score depends on all three, so a protocol has a name and a hash of them that stands in every result. Scores of different
hashes are never put in one column. A rule's `text` says in words (and regular expressions) what its code does: it is hashed
in place of the code, so whoever changes what a rule does changes its text or the protocol's version.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from graft.data.samples import Message
from graft.data.template import Template
from graft.evaluation.tasks.base import AnswerKind, Record, Task
from graft.generation.decoding import Decoding

Outcome = Literal["correct", "wrong", "unextractable", "no_room"]
"""no_room: the prompt leaves no room to answer in the model's context; it is counted as not correct."""

NEW_TOKENS: Mapping[AnswerKind, int] = {
    "number": 256,
    "letter": 256,
    "label": 32,
    "class": 32,
    "score": 32,
    "text": 128,
}
"""Longest answer in tokens: 256 and 32 as LLM-Adapters has them for mathematics and for the rest."""


@dataclass(frozen=True)
class Judgement:
    """What was made of one output."""

    extracted: str | None
    outcome: Outcome


@dataclass(frozen=True)
class Rule:
    """How the answer is found in an output and compared, for one kind of answer."""

    extract: Callable[[str, Task], str | None]
    """(output, task) -> the answer, or None where there is none."""
    same: Callable[[str, str], bool]
    """(right answer, extracted) -> are they the same."""
    text: str
    """What both do, in words."""


@dataclass(frozen=True, kw_only=True)
class Protocol:
    """What all protocols have."""

    name: str
    version: int
    """Raised with every change of what a score depends on that the content does not show."""
    scoring: ClassVar[Literal["output", "likelihood"]]
    """Whether outputs are judged, or the likelihoods of choices."""

    def defines(self, task: Task) -> bool:
        """Whether this protocol says how to score the task."""
        raise NotImplementedError

    def content(self, task: Task) -> dict[str, Any]:
        """Everything that a score depends on besides model and data, as JSON values."""
        raise NotImplementedError

    def digest(self, task: Task) -> str:
        """Twelve digits that name the protocol as it applies to a task."""
        text = json.dumps(self.content(task), sort_keys=True, ensure_ascii=False)
        return hashlib.sha256(text.encode()).hexdigest()[:12]


@dataclass(frozen=True, kw_only=True)
class OutputProtocol(Protocol):
    """The model writes an output; a rule judges it."""

    rules: Mapping[AnswerKind, Rule] = field(repr=False)
    prompt: Template | None = None
    """How the instruction is written out; None: by the template that the adapter was trained with."""
    beams: int = 1
    scoring: ClassVar[Literal["output", "likelihood"]] = "output"

    def defines(self, task: Task) -> bool:
        return task.answer in self.rules

    def content(self, task: Task) -> dict[str, Any]:
        return {
            "name": self.name,
            "version": self.version,
            "prompt": "the adapter's own template" if self.prompt is None else _written(self.prompt),
            "decoding": {"beams": self.beams, "max_new_tokens": NEW_TOKENS[task.answer]},
            "extraction": self.rules[task.answer].text,
            "labels": list(task.labels),
        }

    def decoding(self, task: Task) -> Decoding:
        """How tokens are chosen: deterministic, and ended by the end of the sequence."""
        return Decoding(max_new_tokens=NEW_TOKENS[task.answer], beams=self.beams)

    def messages(self, record: Record) -> tuple[Message, ...]:
        """The conversation that is asked, for `prompt` (or the adapter's own template) to write out."""
        return ({"role": "user", "content": record.instruction},)

    def judge(self, task: Task, gold: str, output: str) -> Judgement:
        """Right or wrong? Nothing found in the output is `unextractable`, which counts as not correct."""
        rule = self.rules[task.answer]
        extracted = rule.extract(output, task)
        if extracted is None:
            return Judgement(None, "unextractable")
        return Judgement(extracted, "correct" if rule.same(gold, extracted) else "wrong")


def _written(template: Template) -> str:
    """A prompt with {instruction} in its place."""
    spans = template.render([{"role": "user", "content": "{instruction}"}], add_generation_prompt=True)
    return "".join(span.text for span in spans)


def same_text(gold: str, extracted: str) -> bool:
    """Equal to the letter."""
    return gold == extracted


def any_choice(task: Task) -> str:
    """A regular expression for any of the task's labels, in their order."""
    return "|".join(task.labels)

"""The base classes of protocols: how a question is asked, how tokens are chosen, and how an output is judged.

A score depends on all three, so every result holds the protocol's name and a hash of them. Scores with different hashes are
never put in one column. The `text` of a rule describes in words (and regular expressions) what its code does. The hash covers
this text instead of the code: if you change what a rule does, change its text or the protocol's version.
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
"""no_room: the prompt leaves no room for an answer in the model's context. It counts as not correct."""

NEW_TOKENS: Mapping[AnswerKind, int] = {
    "number": 256,
    "letter": 256,
    "label": 32,
    "class": 32,
    "score": 32,
    "text": 128,
}
"""Most new tokens of an answer. As in LLM-Adapters, 256 for mathematics and 32 for other questions."""


@dataclass(frozen=True)
class Judgement:
    """The verdict on one output."""

    extracted: str | None
    """The answer that was found in the output."""
    outcome: Outcome


@dataclass(frozen=True)
class Rule:
    """How outputs with one kind of answer are judged."""

    judge: Callable[[Task, str, str], Judgement]
    """(task, right answer, output) -> the judgement."""
    text: str
    """Describes the function in words; part of the protocol's hash."""


def extracting(extract: Callable[[str, Task], str | None], same: Callable[[str, str], bool], text: str) -> Rule:
    """Return the rule that extracts an answer from the output and compares it with the right one.

    extract: (output, task) -> the answer, or None if there is none; then the output is unextractable. same: (right answer,
    extracted answer) -> whether they are equal. text: as in `Rule`.
    """

    def judge(task: Task, gold: str, output: str) -> Judgement:
        extracted = extract(output, task)
        if extracted is None:
            return Judgement(None, "unextractable")
        return Judgement(extracted, "correct" if same(gold, extracted) else "wrong")

    return Rule(judge, text)


@dataclass(frozen=True, kw_only=True)
class Protocol:
    """The base class of all protocols."""

    name: str
    version: int
    """Increased with every change that affects scores but does not show in `content`."""
    scoring: ClassVar[Literal["output", "likelihood"]]
    """Whether the protocol judges outputs or the likelihoods of choices."""

    def defines(self, task: Task) -> bool:
        """Whether this protocol is defined for the task."""
        raise NotImplementedError

    def content(self, task: Task) -> dict[str, Any]:
        """Return everything that a score depends on besides model and data, as JSON values."""
        raise NotImplementedError

    def digest(self, task: Task) -> str:
        """Return twelve hexadecimal digits that identify the protocol as it applies to a task."""
        return digest_of(self.content(task), ensure_ascii=False)


@dataclass(frozen=True, kw_only=True)
class OutputProtocol(Protocol):
    """The model writes an output; a rule judges it."""

    rules: Mapping[AnswerKind, Rule] = field(repr=False)
    prompt: Template | None = None
    """The template of the prompt; None: the template that the adapter was trained with."""
    beams: int = 1
    scoring: ClassVar[Literal["output", "likelihood"]] = "output"

    def defines(self, task: Task) -> bool:
        return task.answer in self.rules

    def content(self, task: Task) -> dict[str, Any]:
        return {
            "name": self.name,
            "version": self.version,
            "prompt": "the adapter's own template" if self.prompt is None else _prompt_text(self.prompt),
            "decoding": {"beams": self.beams, "max_new_tokens": NEW_TOKENS[task.answer]},
            "extraction": self.rules[task.answer].text,
            "labels": list(task.labels),
        }

    def decoding(self, task: Task) -> Decoding:
        """Return the decoding settings, which are deterministic."""
        return Decoding(max_new_tokens=NEW_TOKENS[task.answer], beams=self.beams)

    def messages(self, record: Record) -> tuple[Message, ...]:
        """Return the conversation that `prompt`, or the adapter's own template, turns into text."""
        return ({"role": "user", "content": record.instruction},)

    def judge(self, task: Task, gold: str, output: str) -> Judgement:
        """Judge one output. It is `unextractable`, which counts as not correct, if no answer is found in it."""
        return self.rules[task.answer].judge(task, gold, output)


def _prompt_text(template: Template) -> str:
    """Render a prompt template with {instruction} as its instruction."""
    spans = template.render([{"role": "user", "content": "{instruction}"}], add_generation_prompt=True)
    return "".join(span.text for span in spans)


def digest_of(protocol: Mapping[str, Any], *, ensure_ascii: bool = True) -> str:
    """Return twelve hexadecimal digits that identify everything a score depends on besides model and data."""
    text = json.dumps(protocol, sort_keys=True, ensure_ascii=ensure_ascii)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def same_text(gold: str, extracted: str) -> bool:
    """Whether the two texts are identical."""
    return gold == extracted


def any_choice(task: Task) -> str:
    """Return a regular expression that matches any of the task's labels, in their order."""
    return "|".join(task.labels)

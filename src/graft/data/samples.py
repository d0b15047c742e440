"""What a row becomes: a conversation (`Sample`), then tokens with a mask (`Example`), or a reason why not (`Rejected`)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, NotRequired, TypedDict

import numpy as np
from numpy.typing import NDArray

ROLES = ("system", "user", "assistant")


class Message(TypedDict):
    """One turn of a conversation."""

    role: Literal["system", "user", "assistant"]
    content: str
    input: NotRequired[str]
    """Further context of a question, as Alpaca rows have it. A template without a place for it appends it."""


@dataclass(frozen=True)
class Sample:
    """One conversation and where it came from."""

    messages: tuple[Message, ...]
    source: str
    """File or hub name."""
    row: int
    """Row in that source, from 1."""
    rejected: tuple[Message, ...] = ()
    """Of a pair, the whole conversation with the rejected answer; `messages` is the one with the preferred answer."""
    asked: int = 0
    """Of a pair, how many messages at the start of both are the prompt."""

    @property
    def prompt(self) -> tuple[Message, ...]:
        """The conversation up to its last answer: what is asked."""
        return self.messages[:-1] if self.messages[-1]["role"] == "assistant" else self.messages

    @property
    def answer(self) -> str | None:
        """The last message, where it is an answer."""
        return self.messages[-1]["content"] if self.messages[-1]["role"] == "assistant" else None

    @property
    def where(self) -> str:
        """The row in words, for messages to the user."""
        return f"{self.source}, row {self.row}"


@dataclass
class Example:
    """A tokenised sample. `input_ids` and `supervised` have one entry per token that is read.

    What is learnt is one of four things: tokens of the sample itself (`supervised`), a class or value of the whole sample (`label`),
    the tokens of an answer that a decoder writes (`answer`), or to prefer the supervised tokens to those of another sequence (`rejected`).
    """

    input_ids: NDArray[np.int32]
    supervised: NDArray[np.bool_]
    """True where this token is a target of the loss; never at the first token, which nothing predicts."""
    source: str
    row: int
    cut: int = 0
    """Tokens of the prompt that were removed to make the sample fit."""
    label: int | float | None = None
    """The number of its class (int), or its value (float)."""
    answer: NDArray[np.int32] | None = None
    """What the decoder is to write, end mark included."""
    token_types: NDArray[np.int8] | None = None
    """Which text of a pair each token belongs to, for models that are told so."""
    rejected: Example | None = None
    """The same prompt with the answer that is worse."""

    def __len__(self) -> int:
        """Tokens of all its sequences."""
        return len(self.input_ids) + sum(0 if part is None else len(part) for part in (self.answer, self.rejected))

    @property
    def sequences(self) -> tuple[Example, ...]:
        """What runs through the model one by one: the sample, or both sides of a pair."""
        return (self,) if self.rejected is None else (replace(self, rejected=None), self.rejected)

    @property
    def longest(self) -> int:
        """Tokens of its longest sequence."""
        return max(map(len, self.sequences)) if self.rejected is not None else len(self)

    @property
    def token_types_or_zeros(self) -> NDArray[np.int8]:
        """`token_types`, 0 where the tokenizer tells none."""
        return np.zeros(len(self.input_ids), np.int8) if self.token_types is None else self.token_types

    @property
    def widths(self) -> tuple[int, int]:
        """Tokens that are read, and tokens that a decoder writes; `len` is both together."""
        return len(self.input_ids), 0 if self.answer is None else len(self.answer)

    @property
    def num_targets(self) -> int:
        """How many targets this sample has: supervised tokens, those of its answer, or 1."""
        if self.label is not None:
            return 1
        own = int(self.supervised.sum()) if self.answer is None else len(self.answer)
        return own if self.rejected is None else own + self.rejected.num_targets


@dataclass(frozen=True)
class Rejected:
    """A sample that is not trained on."""

    reason: Literal["overlong", "answer_too_long", "empty_answer", "no_answer", "same_answers"]
    """Longer than allowed; its answer alone (with the template's own words) is longer than allowed; an answer that is
    to be trained on is empty; there is no answer at all; the preferred answer is the rejected one."""
    length: int
    """Its length in tokens, 0 where it was not tokenised."""


def question(message: Message) -> str:
    """The text of a message, its further context appended after a blank line."""
    context = message.get("input")
    return f"{message['content']}\n\n{context}" if context else message["content"]


def without_end(messages: Sequence[Message], end: str) -> list[Message]:
    """Answers without an end-of-sequence text that the data brought along: the template writes it, once."""
    cleaned = list(messages)
    for index, message in enumerate(messages):
        content = message["content"]
        while message["role"] == "assistant" and content.rstrip().endswith(end):
            content = content.rstrip()[: -len(end)]
        if content != message["content"]:
            cleaned[index] = {**message, "content": content}
    return cleaned

"""What a row turns into: a conversation (`Sample`), then tokens with a mask (`Example`), or a reason for leaving it out (`Rejected`)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, NotRequired, TypedDict

import numpy as np
from numpy.typing import NDArray

ROLES = ("system", "user", "assistant", "tool")
THOUGHTS = ("reasoning_content", "thinking", "reasoning")
"""Names that data and chat templates give to the thoughts before an answer."""


class Message(TypedDict):
    """One turn of a conversation."""

    role: Literal["system", "user", "assistant", "tool"]
    content: str
    input: NotRequired[str]
    """Further context of a question, as in Alpaca rows. A template without a place for it appends it to the question."""
    extra: NotRequired[dict[str, Any]]
    """What else a chat template may write: `tool_calls`, the thoughts, `name`, `tool_call_id`, `tool_plan`."""
    tools: NotRequired[list[Any]]
    """On one message of a conversation: the tools that may be called, as chat templates take them."""
    masked: NotRequired[bool]
    """Whether the data say not to train on this answer."""


@dataclass(frozen=True, eq=False)
class Rollout:
    """An answer that a model drew, of N tokens (`rollouts.py`)."""

    prompt: NDArray[np.int32]
    answer: NDArray[np.int32]
    """[N]"""
    logprobs: NDArray[np.float32]
    """[N]"""
    advantages: NDArray[np.float32]
    """[N]"""


@dataclass(frozen=True)
class Sample:
    """One conversation and its origin."""

    messages: tuple[Message, ...]
    source: str
    """File or hub name."""
    row: int
    """Row in that source, counted from 1."""
    rejected: tuple[Message, ...] = ()
    """For a pair: the whole conversation with the rejected answer; `messages` then holds the one with the preferred answer."""
    asked: int = 0
    """For a pair, or an answer that is marked: the number of messages at the start that are the prompt."""
    desirable: bool | None = None
    """For an answer that is marked: whether it is good."""
    rollout: Rollout | None = None
    """For an answer that a model drew: its tokens and numbers; `messages` then hold the token ids as text."""

    @property
    def prompt(self) -> tuple[Message, ...]:
        """The conversation without its last answer."""
        return self.messages[:-1] if self.messages[-1]["role"] == "assistant" else self.messages

    @property
    def answer(self) -> str | None:
        """The text of the last message if it is an answer, else None."""
        return self.messages[-1]["content"] if self.messages[-1]["role"] == "assistant" else None

    @property
    def where(self) -> str:
        """Source and row in words, for error messages."""
        return f"{self.source}, row {self.row}"


@dataclass
class Example:
    """A tokenised sample. `input_ids` and `supervised` have one entry per token that the model reads.

    The model learns one of these things from it:

    - tokens of the sample itself (`supervised`);
    - a class or a value for the whole sample (`label`);
    - an answer that a decoder writes (`answer`);
    - to prefer its supervised tokens to those of another sequence (`rejected`);
    - that its supervised tokens are good or bad (`desirable`);
    - that its supervised tokens, which a model drew, are better or worse than others (`advantages`).
    """

    input_ids: NDArray[np.int32]
    supervised: NDArray[np.bool_]
    """True where the token is a target of the loss; never at the first token, because nothing predicts it."""
    source: str
    row: int
    cut: int = 0
    """Tokens of the prompt that were removed to make the sample fit."""
    label: int | float | None = None
    """The number of the class (int), or the value (float)."""
    answer: NDArray[np.int32] | None = None
    """The token ids that the decoder learns to write, end mark included."""
    token_types: NDArray[np.int8] | None = None
    """The text of a pair that each token belongs to (0 or 1), for models that take token types."""
    rejected: Example | None = None
    """The same prompt with the rejected answer; of an answer that is marked, the same prompt with the answer of another sample."""
    desirable: bool | None = None
    """Of an answer that is marked: whether it is good."""
    logprobs: NDArray[np.float32] | None = None
    """Of an answer that a model drew: the log-probability of each supervised token when it was drawn."""
    advantages: NDArray[np.float32] | None = None
    """Likewise its advantage."""
    piece: int = 0
    """Of a document that was split: the number of the piece, from 0."""

    def __len__(self) -> int:
        """Count the tokens of all its sequences."""
        return len(self.input_ids) + sum(0 if part is None else len(part) for part in (self.answer, self.rejected))

    @property
    def sequences(self) -> tuple[Example, ...]:
        """The sequences that run through the model one by one: the sample, or both sides of a pair."""
        return (self,) if self.rejected is None else (replace(self, rejected=None), self.rejected)

    @property
    def longest(self) -> int:
        """Tokens of the longest sequence."""
        return max(map(len, self.sequences)) if self.rejected is not None else len(self)

    @property
    def token_types_or_zeros(self) -> NDArray[np.int8]:
        """`token_types`, or zeros if the tokenizer gives none."""
        return np.zeros(len(self.input_ids), np.int8) if self.token_types is None else self.token_types

    @property
    def widths(self) -> tuple[int, int]:
        """The number of tokens read, and of tokens that a decoder writes. `len` is their sum."""
        return len(self.input_ids), 0 if self.answer is None else len(self.answer)

    @property
    def num_targets(self) -> int:
        """The number of targets: supervised tokens, tokens of the decoder's answer, or 1 for a label."""
        if self.label is not None:
            return 1
        own = int(self.supervised.sum()) if self.answer is None else len(self.answer)
        pair = self.rejected is not None and self.desirable is None
        return own + self.rejected.num_targets if pair and self.rejected is not None else own


@dataclass(frozen=True)
class Rejected:
    """A sample that is left out."""

    reason: Literal["overlong", "answer_too_long", "empty_answer", "no_answer", "same_answers", "masked"]
    """overlong: longer than allowed. answer_too_long: too long even with the whole prompt cut. empty_answer: an answer (or
    a labelled text) is empty. no_answer: there is no answer at all. same_answers: the preferred answer equals the rejected one.
    masked: the data say not to train on any answer."""
    length: int
    """Length in tokens, or 0 if the sample was not tokenised."""


def question(message: Message) -> str:
    """Return the text of a message, with its further context after a blank line."""
    context = message.get("input")
    return f"{message['content']}\n\n{context}" if context else message["content"]


def is_silent(message: Message) -> bool:
    """Whether a message says nothing: it has neither content nor tool calls."""
    return not message["content"].strip() and "tool_calls" not in message.get("extra", {})


def without_end(messages: Sequence[Message], end: str) -> list[Message]:
    """Strip a literal end-of-sequence text from the answers: the template writes it, and only once."""
    cleaned = list(messages)
    for index, message in enumerate(messages):
        content = message["content"]
        while message["role"] == "assistant" and content.rstrip().endswith(end):
            content = content.rstrip()[: -len(end)]
        if content != message["content"]:
            cleaned[index] = {**message, "content": content}
    return cleaned

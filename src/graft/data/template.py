"""The base class of templates. A template renders a conversation as text and says which characters the model learns.

A saved template holds everything that rendering depends on, including special tokens and system prompt; its digest identifies this content.
See templates.py for where templates come from.
"""

from __future__ import annotations

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Container, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Self

from graft.data.encoding import Span, encode, facts_of
from graft.data.samples import Message, without_end
from graft.errors import GraftError
from graft.utils.files import write_text_atomic

FILE = "template.json"
JINJA = "chat_template.jinja"


@dataclass(frozen=True)
class Template(ABC):
    """Renders conversations as spans of text."""

    name: str
    system_prompt: str | None = None
    """The system prompt of conversations that have none; None adds nothing."""
    reads_tokens: bool = field(default=False, kw_only=True)
    """Whether special tokens that the data spell become these tokens; otherwise they stay text."""

    @abstractmethod
    def _spans(self, messages: Sequence[Message], add_generation_prompt: bool, learnt: Container[int]) -> list[Span]:
        """Render a complete conversation; empty spans are allowed."""

    @abstractmethod
    def content(self) -> dict[str, Any]:
        """Return everything that the rendering depends on, as JSON values."""

    def everything(self) -> dict[str, Any]:
        """Return `content`, and how tokens in the data are read where that is not the usual way."""
        return {**self.content(), **({"reads_tokens": True} if self.reads_tokens else {})}

    def complete(self, messages: Sequence[Message]) -> list[Message]:
        """Return the conversation, with the default system prompt if it has none. `Span.message` counts in this list."""
        if self.system_prompt is None or (messages and messages[0]["role"] == "system"):
            return list(messages)
        return [{"role": "system", "content": self.system_prompt}, *messages]

    def render(
        self,
        messages: Sequence[Message],
        *,
        add_generation_prompt: bool = False,
        learnt: Container[int] | None = None,
    ) -> list[Span]:
        """Render a conversation. The spans of answers and their end marks are `supervised`.

        With `add_generation_prompt` the text ends where the answer to the last message begins.
        learnt: the answers that are trained on, as indices into `complete(messages)`; None is every answer, or none of a prompt. Other
        answers are history: they are written as the template writes them, even where it omits a part.
        Raises `GraftError` if the template cannot write the conversation, or if learnt answers cannot be told apart from the rest.
        """
        messages = self.complete(messages)
        if add_generation_prompt and messages and messages[-1]["role"] == "assistant":
            raise GraftError("a prompt ends with a question, but this conversation ends with an answer")
        if learnt is None:
            learnt = () if add_generation_prompt else range(len(messages))
        return [span for span in self._spans(messages, add_generation_prompt, learnt) if span.text or span.ends]

    def prompt_ids(self, messages: Sequence[Message], tokenizer: Any) -> list[int]:
        """Return the token ids of everything before the answer to the last message, as in training. Generation starts from them."""
        messages = without_end(messages, facts_of(tokenizer).eos)
        return encode(self.render(messages, add_generation_prompt=True), tokenizer, self.reads_tokens).ids

    def stop_ids(self, tokenizer: Any) -> tuple[int, ...]:
        """Return the tokens that end an answer: generation stops at any of them."""
        return (facts_of(tokenizer).eos_id,)

    def with_system(self, system: str | None) -> Self:
        """Return the same template with another default system prompt; None changes nothing."""
        return self if system is None else replace(self, system_prompt=system)

    @property
    def digest(self) -> str:
        """SHA-256 of the content. Templates with equal digests write every conversation alike."""
        return hashlib.sha256(json.dumps(self.everything(), sort_keys=True).encode()).hexdigest()

    def save(self, folder: str | Path) -> None:
        """Write `template.json` (and `chat_template.jinja`) into an existing folder, beside the adapter."""
        content = {"name": self.name, "digest": self.digest, **self.everything()}
        if (jinja := content.pop("jinja", None)) is not None:
            write_text_atomic(Path(folder) / JINJA, jinja)
        write_text_atomic(Path(folder) / FILE, json.dumps(content, indent=2, ensure_ascii=False) + "\n")

"""A conversation with a base and its adapters: it keeps the turns and streams the answers as text."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from graft.bases.context import context_length
from graft.data.samples import Message
from graft.generation.generate import stream
from graft.generation.loaded import Candidate, LoadedModel
from graft.generation.prompts import request_of
from graft.generation.requests import Decoding, limits
from graft.generation.text_stream import TextStream


class Conversation:
    """A conversation in which one candidate at a time answers. Switching the candidate keeps the turns."""

    def __init__(
        self, loaded: LoadedModel, candidate: Candidate, decoding: Decoding, system: str | None = None
    ) -> None:
        self.loaded = loaded
        self.candidate = candidate
        self.decoding = decoding
        self.system = system
        self.messages: list[Message] = []

    def switch(self, name: str) -> None:
        """Let another adapter, or the base, answer from now on. Raises `GraftError` for an unknown name."""
        self.candidate = self.loaded.find(name)

    def reset(self) -> None:
        """Forget all turns."""
        self.messages = []

    def ask(self, text: str) -> Iterator[str]:
        """Yield the answer to a question piece by piece and add both to the conversation, even if the answer is interrupted.

        If the conversation fills the context, the answer is a note that says so, and the question is not added.
        """
        tokenizer, template = self.loaded.base.tokenizer, self.candidate.template.with_system(self.system)
        asked: list[Message] = [*self.messages, {"role": "user", "content": text}]
        request = request_of(self.loaded.base, template, self.candidate.adapter, asked)
        if limits(self.loaded.base.model, [request], self.decoding) == [0]:
            room = context_length(self.loaded.base.model, self.candidate.adapter)
            yield f"[no room: {request.tokens} tokens fill the context of {room}; start again with /reset]"
            return
        answer = ""
        try:  # `finally` also runs when the caller stops iterating, for example after Ctrl-C
            for piece in as_text(stream(self.loaded.base.model, request, self.decoding), tokenizer):
                answer += piece
                yield piece
        finally:
            self.messages = [*asked, {"role": "assistant", "content": answer}]


def as_text(ids: Iterable[int], tokenizer: Any) -> Iterator[str]:
    """Yield tokens as text while they arrive. A character that is made of several tokens is held back until it is complete."""
    text = TextStream(tokenizer)
    for token in ids:
        text.add(token)
        if piece := text.take():
            yield piece
    text.finish()
    if piece := text.take():
        yield piece

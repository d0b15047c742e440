"""A conversation with a base and its adapters: the turns so far, who answers, and answers as text while they come."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from tokenizers.decoders import DecodeStream

from graft.bases.context import context_length
from graft.data.samples import Message
from graft.generation.generate import stream
from graft.generation.loaded import Candidate, LoadedModel
from graft.generation.requests import Decoding, Request, limits


class Conversation:
    """Turns with one answerer at a time. Switching keeps what was said."""

    def __init__(
        self, loaded: LoadedModel, candidate: Candidate, decoding: Decoding, system: str | None = None
    ) -> None:
        self.loaded = loaded
        self.candidate = candidate
        self.decoding = decoding
        self.system = system
        self.messages: list[Message] = []

    def switch(self, name: str) -> None:
        """Let another adapter, or the base, answer. Raises `GraftError` for a name that is not there."""
        self.candidate = self.loaded.find(name)

    def reset(self) -> None:
        """Forget what was said."""
        self.messages = []

    def ask(self, text: str) -> Iterator[str]:
        """The answer to a question, piece by piece. What was answered, were it cut short, becomes part of the conversation.

        Where the conversation fills the context the answer says so, and the question is taken back.
        """
        tokenizer, template = self.loaded.base.tokenizer, self.candidate.template.with_system(self.system)
        asked: list[Message] = [*self.messages, {"role": "user", "content": text}]
        ids = template.prompt_ids(asked, tokenizer)
        request = Request(tuple(ids), self.candidate.adapter, frozenset(template.stop_ids(tokenizer)))
        if limits(self.loaded.base.model, [request], self.decoding) == [0]:
            room = context_length(self.loaded.base.model, self.candidate.adapter)
            yield f"[no room: {len(ids)} tokens fill the context of {room}; forget the conversation with /reset]"
            return
        answer = ""
        try:
            for piece in as_text(stream(self.loaded.base.model, request, self.decoding), tokenizer):
                answer += piece
                yield piece
        finally:
            self.messages = [*asked, {"role": "assistant", "content": answer}]


def as_text(ids: Iterable[int], tokenizer: Any) -> Iterator[str]:
    """Tokens as text while they come; a character of several tokens comes when it is whole."""
    decoder = DecodeStream(skip_special_tokens=True)
    seen: list[int] = []
    shown = ""
    for token in ids:
        seen.append(token)
        if piece := decoder.step(tokenizer.backend_tokenizer, token):
            shown += piece
            yield piece
    whole = tokenizer.decode(seen, skip_special_tokens=True)
    if whole.startswith(shown) and len(whole) > len(shown):
        yield whole[len(shown) :]

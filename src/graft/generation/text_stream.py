"""Tokens as text while they arrive, and stop texts wherever the borders of tokens are.

A character that is made of several tokens is held back until it is complete. With stop texts, what may be the beginning of one is held
back too: with stop "###", the answer "4 #" shows "4 " until the next token says whether "###" comes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tokenizers.decoders import DecodeStream


class TextStream:
    """The text of one answer."""

    def __init__(self, tokenizer: Any, stop: Sequence[str] = ()) -> None:
        self._tokenizer = tokenizer
        self._stop = tuple(stop)
        self._decoder = DecodeStream(skip_special_tokens=True)
        self._ids: list[int] = []
        self.text = ""
        """All text so far; once stopped, without the stop text and what follows it."""
        self.stopped = False
        self._shown = 0

    def add(self, token: int) -> bool:
        """Take the next token. Returns whether a stop text is complete."""
        self._ids.append(token)
        self._extend(self._decoder.step(self._tokenizer.backend_tokenizer, token) or "")
        return self.stopped

    def finish(self) -> None:
        """Take what is still held back: an incomplete last character, as the tokenizer decodes everything at once."""
        whole = self._tokenizer.decode(self._ids, skip_special_tokens=True) if not self.stopped else ""
        if whole.startswith(self.text):
            self._extend(whole[len(self.text) :])

    def take(self, ended: bool = False) -> str:
        """Return the text that is new since the last call and sure to stay. ended: nothing follows, so nothing is held back."""
        sure = len(self.text) if ended or self.stopped else len(self.text) - self._held()
        piece, self._shown = self.text[self._shown : sure], max(sure, self._shown)
        return piece

    def _extend(self, piece: str) -> None:
        start = max(0, len(self.text) - max(map(len, self._stop), default=0))
        self.text += piece
        found = [at for stop in self._stop if (at := self.text.find(stop, start)) >= 0]
        if found and piece:
            self.text, self.stopped = self.text[: min(found)], True

    def _held(self) -> int:
        """Characters at the end that may begin a stop text."""
        return max(
            (size for stop in self._stop for size in range(1, len(stop)) if self.text.endswith(stop[:size])), default=0
        )

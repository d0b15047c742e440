"""Answers in the forms of OpenAI's API: whole, and as chunks of a stream."""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

from transformers.convert_slow_tokenizer import bytes_to_unicode

from graft.generation.sampling import End, PromptScores, Top
from graft.serving.tickets import Piece, Token

LOWEST = -9999.0
"""What stands for the log-probability of a token that cannot come, since JSON has no infinity."""
FINISH = {"stop": "stop", "length": "length"}
_BYTES = {character: byte for byte, character in bytes_to_unicode().items()}


@dataclass
class Answer:
    """One sample, as far as it has come."""

    index: int
    text: str = ""
    tokens: list[Token] = field(default_factory=list)
    end: End | None = None
    problem: str | None = None

    def add(self, piece: Piece) -> None:
        """Take what is new."""
        self.text += piece.text
        self.tokens += piece.tokens
        self.end, self.problem = piece.end, piece.problem
        if piece.exact is not None:
            self.tokens = [
                Token(each.id, exact, each.top) for each, exact in zip(self.tokens, piece.exact, strict=True)
            ]


class Replies:
    """Writes the answers to one request."""

    def __init__(self, tokenizer: Any, chat: bool, model: str, fingerprint: str) -> None:
        self.tokenizer, self.chat = tokenizer, chat
        self._head = {
            "id": f"{'chatcmpl' if chat else 'cmpl'}-{uuid.uuid4().hex}",
            "created": int(time.time()),
            "model": model,
            "system_fingerprint": fingerprint,
        }

    def whole(self, choices: Sequence[dict[str, Any]], usage: dict[str, Any]) -> dict[str, Any]:
        """Return the body of an answer that does not stream."""
        return {
            **self._head,
            "object": "chat.completion" if self.chat else "text_completion",
            "choices": choices,
            "usage": usage,
        }

    def chunk(self, choices: Sequence[dict[str, Any]], usage: dict[str, Any] | None = None) -> str:
        """Return the data of one event of a stream."""
        kind = "chat.completion.chunk" if self.chat else "text_completion"
        return json.dumps({**self._head, "object": kind, "choices": choices, "usage": usage}, ensure_ascii=False)

    def chat_choice(self, answer: Answer, logprobs: bool) -> dict[str, Any]:
        """Return one choice of a whole chat answer."""
        scores = {"content": self.chat_logprobs(answer.tokens), "refusal": None} if logprobs else None
        message = {"role": "assistant", "content": answer.text, "refusal": None}
        return {"index": answer.index, "message": message, "logprobs": scores, "finish_reason": _finish(answer.end)}

    def chat_delta(self, piece: Piece, logprobs: bool, first: bool) -> dict[str, Any]:
        """Return what is new in one choice of a stream."""
        delta = {**({"role": "assistant"} if first else {}), "content": piece.text}
        scores = {"content": self.chat_logprobs(piece.tokens), "refusal": None} if logprobs and piece.tokens else None
        return {"index": piece.index, "delta": delta, "logprobs": scores, "finish_reason": _finish(piece.end)}

    def chat_logprobs(self, tokens: Sequence[Token]) -> list[dict[str, Any]]:
        """Return the tokens of a chat answer with their log-probabilities."""
        return [
            {**self._scored(each.id, each.logprob), "top_logprobs": [self._scored(*pair) for pair in each.top]}
            for each in tokens
        ]

    def _scored(self, token: int, logprob: float | None) -> dict[str, Any]:
        text, raw = token_text(self.tokenizer, token)
        return {"token": text, "logprob": _finite(logprob), "bytes": raw}

    def completion_choice(
        self,
        index: int,
        text: str,
        tokens: Sequence[Token],
        end: End | None,
        logprobs: bool,
        prompt: tuple[str, Sequence[Token]] | None = None,
        offset: int = 0,
    ) -> dict[str, Any]:
        """Return one choice of a completion. prompt: text and tokens that are repeated before it. offset: characters before `text`."""
        before, scored = prompt or ("", ())
        found = {"index": index, "text": before + text, "finish_reason": _finish(end), "logprobs": None}
        return {**found, "logprobs": self.completion_logprobs([*scored, *tokens], offset)} if logprobs else found

    def completion_logprobs(self, tokens: Sequence[Token], offset: int) -> dict[str, Any]:
        """Return the tokens of a completion with their log-probabilities, in four lists."""
        texts, offsets = [token_text(self.tokenizer, each.id)[0] for each in tokens], []
        for text in texts:
            offsets.append(offset)
            offset += len(text)
        tops = [
            {token_text(self.tokenizer, token)[0]: _finite(value) for token, value in each.top}
            if each.logprob is not None
            else None
            for each in tokens
        ]
        scores = [None if each.logprob is None else _finite(each.logprob) for each in tokens]
        return {"tokens": texts, "token_logprobs": scores, "top_logprobs": tops, "text_offset": offsets}


def usage_of(prompt_tokens: int, answers: Sequence[Answer], cached: int) -> dict[str, Any]:
    """Return the tokens that were read and written. cached: of those read, taken from the prefix cache."""
    written = sum(len(each.tokens) for each in answers)
    counts = {"prompt_tokens": prompt_tokens, "completion_tokens": written, "total_tokens": prompt_tokens + written}
    return {**counts, "prompt_tokens_details": {"cached_tokens": cached}}


def prompt_tokens(ids: Sequence[int], scores: PromptScores | None) -> list[Token]:
    """Return the tokens of a prompt with what is known of them."""
    if scores is None:
        return [Token(each) for each in ids]
    tops: Sequence[Top | None] = scores.top or (None,) * len(ids)
    return [Token(each, score, top or ()) for each, score, top in zip(ids, scores.logprobs, tops, strict=True)]


def token_text(tokenizer: Any, token: int) -> tuple[str, list[int] | None]:
    """Return a token as text, and its bytes; None where the vocabulary does not say them."""
    return _token_text(tokenizer, token)


@lru_cache(maxsize=65_536)
def _token_text(tokenizer: Any, token: int) -> tuple[str, list[int] | None]:
    text = tokenizer.decode([token])
    if "\ufffd" not in text:
        return text, list(text.encode())
    written = tokenizer.convert_ids_to_tokens(token) or ""
    if len(written) == 6 and written.startswith("<0x"):
        return f"bytes:\\x{written[3:5].lower()}", [int(written[3:5], 16)]
    raw = [_BYTES[character] for character in written if character in _BYTES]
    return ("bytes:" + "".join(f"\\x{byte:02x}" for byte in raw), raw) if len(raw) == len(written) else (text, None)


def _finish(end: End | None) -> str | None:
    return None if end is None else FINISH.get(end, "length")


def _finite(value: float | None) -> float:
    return LOWEST if value is None else max(value, LOWEST)

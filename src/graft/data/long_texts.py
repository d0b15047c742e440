"""Texts that are much longer than what may be kept of them. They are measured in pieces, so that memory does not grow with them.

A tokenizer takes hundreds of bytes for each character. A row of ten megabytes would take gigabytes to be found too long, or to lose all
but the last tokens of its question.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from graft.data.samples import Message, Rejected, Sample

PIECE = 20_000
"""Characters that are tokenised at once."""
LONG = 100_000
"""A text of fewer characters is tokenised as a whole."""


def shortened(
    sample: Sample, tokenizer: Any, max_length: int, overlong: str, *, keep_start: bool = False
) -> tuple[Sample, int] | Rejected:
    """Return the sample with no more of its long questions than may be kept, and the number of tokens that went.

    A sample that is far too long is rejected, unless `overlong` says to cut its questions (or its plain text, into pieces).
    keep_start: questions lose their end, and not their start. Lengths of long texts are exact but for the seams of the pieces.
    """
    if overlong == "split" or not any(_is_long(text, max_length) for text in _texts(sample)):
        return sample, 0
    if overlong != "truncate_prompt":
        total = max(sum(_count(_written(message), tokenizer) for message in side) for side in _sides(sample))
        return Rejected("overlong", total) if total > 2 * max_length else (sample, 0)
    gone = 0
    cut: dict[str, str] = {}
    for text in dict.fromkeys(_texts(sample)):
        if _is_long(text, max_length):
            cut[text] = _kept(text, tokenizer, 2 * max_length, keep_start)
            gone += _count(text, tokenizer) - _count(cut[text], tokenizer)
    asked = [tuple(_cut(message, cut) for message in side) for side in (sample.messages, sample.rejected)]
    left = replace(sample, messages=asked[0], rejected=asked[1])
    if any(_is_long(text, max_length) for text in _texts(left)):  # an answer, which is never cut
        return Rejected("answer_too_long", sum(_count(_written(message), tokenizer) for message in sample.messages))
    return left, gone


def bounded(
    messages: Sequence[Message], tokenizer: Any, max_length: int | None
) -> tuple[Sequence[Message], int | None]:
    """Return a prompt, and None. One that is far too long for `max_length` tokens (None: nothing is) is returned shortened.

    A shortened one is still too long, and comes with the number of its tokens. That is exact but for the seams of the pieces.
    """
    if max_length is None or not any(_is_long(_written(message), max_length) for message in messages):
        return messages, None
    cut: list[Message] = []
    for message in messages:
        short = _kept(message["content"], tokenizer, 2 * max_length, keep_start=True)
        made: Message = {**message, "content": short}
        if "input" in message:
            made["input"] = _kept(message["input"], tokenizer, 2 * max_length, keep_start=True)
        cut.append(made)
    if cut == list(messages):  # many characters, few tokens
        return messages, None
    return cut, sum(_count(_written(message), tokenizer) for message in messages)


def _sides(sample: Sample) -> list[tuple[Message, ...]]:
    return [side for side in (sample.messages, sample.rejected) if side]


def _texts(sample: Sample) -> list[str]:
    messages = (message for side in _sides(sample) for message in side)
    return [text for message in messages for text in (message["content"], message.get("input", ""))]


def _written(message: Message) -> str:
    return message["content"] + message.get("input", "")


def _is_long(text: str, max_length: int) -> bool:
    return len(text) > max(LONG, 32 * max_length)


def _cut(message: Message, cut: dict[str, str]) -> Message:
    if message["role"] != "user":
        return message
    made: Message = {**message, "content": cut.get(message["content"], message["content"])}
    if "input" in made:
        made["input"] = cut.get(made["input"], made["input"])
    return made


def _pieces(text: str) -> list[str]:
    return [text[start : start + PIECE] for start in range(0, len(text), PIECE)]


def _count(text: str, tokenizer: Any) -> int:
    return sum(
        len(tokenizer(piece, add_special_tokens=False, verbose=False)["input_ids"]) for piece in _pieces(text) if piece
    )


def _kept(text: str, tokenizer: Any, tokens: int, keep_start: bool) -> str:
    """Return so many pieces from the end (or the start) of a text that they hold at least this many tokens."""
    pieces = _pieces(text)
    pieces = pieces if keep_start else pieces[::-1]
    kept: list[str] = []
    for piece in pieces:
        kept.append(piece)
        tokens -= _count(piece, tokenizer)
        if tokens < 0:
            break
    return "".join(kept if keep_start else kept[::-1])

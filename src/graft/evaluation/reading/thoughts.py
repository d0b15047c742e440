"""The thoughts that a model writes before its answer, between marks such as <think> and </think>.

They are no part of the answer. A thought that does not end was cut off, and the answer with it.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

_NAMES = "think|thinking|thought|thoughts|reason|reasoning|seed:think|begin_of_thought"
_OPENS = re.compile(rf"<\|?(?:{_NAMES})\|?>|\[THINK\]|◁think▷", re.IGNORECASE)
_CLOSES = re.compile(rf"</(?:{_NAMES})>|<\|end_of_thought\|>|\[/THINK\]|◁/think▷", re.IGNORECASE)
_LOOKED_AT = 16
"""Tokens at the end of a prompt in which an open mark is looked for."""


def without_thoughts(text: str) -> str | None:
    """Return what follows the last thought, or None if the text ends within a thought."""
    closed = list(_CLOSES.finditer(text))
    rest = text[closed[-1].end() :] if closed else text
    return None if _OPENS.search(rest) else rest


def with_thoughts(tokenizer: Any, prompt: Sequence[int], answer: Sequence[int]) -> str:
    """Return the text of an answer without special tokens, but with the marks of its thoughts.

    If the prompt ends in an open mark, as some templates write it, the text begins with this mark. prompt, answer: token ids.
    """
    asked = tokenizer.decode(list(prompt[-_LOOKED_AT:]), skip_special_tokens=False)
    opened = list(_OPENS.finditer(asked))
    begun = opened[-1][0] + "\n" if opened and not asked[opened[-1].end() :].strip() else ""
    marks = {
        number: token
        for token, number in tokenizer.get_added_vocab().items()
        if (_OPENS.fullmatch(token) or _CLOSES.fullmatch(token))
        and not tokenizer.decode([number], skip_special_tokens=True)
    }
    parts, start = [begun], 0
    for place, number in enumerate(answer):
        if number in marks:
            parts += [tokenizer.decode(list(answer[start:place]), skip_special_tokens=True), marks[number]]
            start = place + 1
    return "".join(parts) + tokenizer.decode(list(answer[start:]), skip_special_tokens=True)

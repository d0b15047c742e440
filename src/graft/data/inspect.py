"""Show an example as the model sees it: the tokens that it reads, and the tokens that it learns to write."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import groupby
from typing import Any

from rich.text import Text

from graft.data.samples import Example

READ, LEARNT, WORSE = "dim", "bold green", "bold red"


def coloured(example: Example, tokenizer: Any, *, marks: bool = False, classes: Sequence[str] = ()) -> Text:
    """Return the text of an example, special tokens included: dim text is only read, bold green text is trained on.

    The text is decoded from the token ids, so a token that should not be there becomes visible. With `marks`, brackets enclose the text
    that is trained on, for output without colours. A label, or the answer of a decoder, follows an arrow. The rejected answer of a pair
    follows in bold red.
    """
    shown = Text()
    if example.desirable is not None:
        own = replace(example, rejected=None, desirable=None)
        shown.append("good: " if example.desirable else "bad: ", style=READ)
        return shown.append_text(coloured(own, tokenizer, marks=marks))
    if example.rejected is not None:
        chosen, rejected = example.sequences
        start = int(rejected.supervised.argmax())
        worse = _decoded(rejected, start, len(rejected.input_ids), tokenizer)
        shown.append_text(coloured(chosen, tokenizer, marks=marks)).append("\nrejected: ", style=READ)
        return shown.append(f"⟦{worse}⟧" if marks else worse, style=WORSE)
    if example.label is not None or example.answer is not None:
        learnt = learnt_text(example, tokenizer, classes)
        shown.append(_decode(example.input_ids.tolist(), tokenizer), style=READ)
        return shown.append(" -> ", style=READ).append(f"⟦{learnt}⟧" if marks else learnt, style=LEARNT)
    start = 0
    for learnt, group in groupby(example.supervised.tolist()):
        stop = start + len(list(group))
        text = _decoded(example, start, stop, tokenizer)
        shown.append(f"⟦{text}⟧" if learnt and marks else text, style=LEARNT if learnt else READ)
        start = stop
    return shown


def pieces(example: Example, tokenizer: Any, classes: Sequence[str] = ()) -> list[tuple[str, str]]:
    """Return the text of an example in pieces (text, "read", "learnt" or "worse"), as `coloured` colours them."""
    text = coloured(example, tokenizer, classes=classes)
    names = {READ: "read", LEARNT: "learnt", WORSE: "worse"}
    return [(text.plain[span.start : span.end], names[str(span.style)]) for span in text.spans]


def learnt_text(example: Example, tokenizer: Any, classes: Sequence[str] = ()) -> str:
    """Return what an example teaches: its supervised tokens, its decoder's answer, its class or its value."""
    if example.label is not None:
        return classes[int(example.label)] if classes else f"{example.label:g}"
    ids = example.input_ids[example.supervised] if example.answer is None else example.answer
    return _decode(ids.tolist(), tokenizer)


def _decoded(example: Example, start: int, stop: int, tokenizer: Any) -> str:
    """Decode the tokens start..stop as the continuation of the tokens before them.

    Decoded alone, a token may lose its leading space or half of a character; so the text of the longer stretch is split.
    """
    before = _decode(example.input_ids[:start].tolist(), tokenizer)
    upto = _decode(example.input_ids[:stop].tolist(), tokenizer)
    if upto.startswith(before):
        return upto[len(before) :]
    return _decode(example.input_ids[start:stop].tolist(), tokenizer)


def _decode(ids: list[int], tokenizer: Any) -> str:
    return tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)

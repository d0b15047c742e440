"""Show an example as the model sees it: what is read, and what is learnt."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from typing import Any

from rich.text import Text

from graft.data.samples import Example

READ, LEARNT, WORSE = "dim", "bold green", "bold red"


def coloured(example: Example, tokenizer: Any, *, marks: bool = False, classes: Sequence[str] = ()) -> Text:
    """The example's text, special tokens included: dim is read only, bold green is trained on.

    Decoded from the ids, so a token that should not be there shows. With `marks`, what is trained on also stands between
    brackets, for output without colours. A label, or the answer of a decoder, stands behind an arrow. Of a pair the rejected answer
    follows in bold red.
    """
    shown = Text()
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


def learnt_text(example: Example, tokenizer: Any, classes: Sequence[str] = ()) -> str:
    """What an example teaches: its supervised tokens, the answer of its decoder, its class or its value."""
    if example.label is not None:
        return classes[int(example.label)] if classes else f"{example.label:g}"
    ids = example.input_ids[example.supervised] if example.answer is None else example.answer
    return _decode(ids.tolist(), tokenizer)


def _decoded(example: Example, start: int, stop: int, tokenizer: Any) -> str:
    """The text of tokens start..stop as it reads after the tokens before them."""
    before = _decode(example.input_ids[:start].tolist(), tokenizer)
    upto = _decode(example.input_ids[:stop].tolist(), tokenizer)
    if upto.startswith(before):
        return upto[len(before) :]
    return _decode(example.input_ids[start:stop].tolist(), tokenizer)


def _decode(ids: list[int], tokenizer: Any) -> str:
    return tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)

"""Turn spans of text into token ids, the same way for training, evaluation and chat.

The text is cut at each border between prompt and answer, and every piece is tokenised as the continuation of the piece before it. So no
token straddles a border, and the ids of a prompt do not depend on the answer: in evaluation `prompt_ids` returns exactly the ids that
preceded the answer in training, and generation starts from them.

- The tokens that the tokenizer puts at the start of a text (BOS) come first, once, unless the text already begins with them.
  The tokens that it puts at the end are omitted: the end-of-sequence token is written where the template says so.
- Text from the data does not turn into control tokens, unless the user says so: "</s>" in an answer stays four characters.
- Some tokenizers mark the start of a text like a space (LLaMA's "▁"). A piece that continues a text must not have this mark, so it is
  tokenised after an anchor that is cut off again: "sat" becomes the tokens of "\\nsat" without those of the line end.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import takewhile
from typing import Any
from weakref import WeakKeyDictionary

from graft.errors import GraftError


@dataclass(frozen=True)
class Span:
    """A stretch of rendered text."""

    text: str
    supervised: bool = False
    """Whether this is part of an answer (or its end mark), which the model learns to write."""
    message: int | None = None
    """Index of the message that this content belongs to; None for the template's own words."""
    ends: bool = False
    """Whether the end-of-sequence token follows, as part of this span."""
    answer: int | None = None
    """Index of the answer (a message) that this is a part of: its content, what stands before it, or its end mark."""
    asked: bool = False
    """Whether this part of an answer is already in the prompt for it, as where a template marks its own header as generated."""


@dataclass
class Tokens:
    """Token ids, each with the span that it lies in."""

    ids: list[int] = field(default_factory=list)
    spans: list[int] = field(default_factory=list)
    """Index of the span of each token; -1 for the tokens that the tokenizer puts at the start."""
    whole: list[bool] = field(default_factory=list)
    """False if the token also holds characters of a neighbouring span."""


def encode(spans: Sequence[Span], tokenizer: Any, reads_tokens: bool = False) -> Tokens:
    """Tokenise spans. reads_tokens: special tokens that content spells become these tokens, instead of text.

    Raises `GraftError` for a tokenizer that is not fast or has no end-of-sequence token.
    """
    facts = facts_of(tokenizer)
    tokens = Tokens()
    before = ""  # the piece before, which the next one continues
    for piece in _pieces(spans, facts, reads_tokens):
        text = "".join(spans[index].text for index in piece)
        if text:
            # Content that spells out a special token is a piece of its own (see _pieces), and is tokenised as plain text.
            content = not reads_tokens and all(spans[index].message is not None for index in piece)
            as_text = content and facts.holds_control(text)
            _append(tokens, spans, piece, facts.encode(text, before, as_text))
            before = text
        if spans[piece[-1]].ends:
            # The end-of-sequence token belongs to the span that it ends.
            _append(tokens, spans, piece[-1:], [(facts.eos_id, 0, len(spans[piece[-1]].text))])
            before = facts.eos
    start = [] if tokens.ids[: len(facts.start_ids)] == facts.start_ids else facts.start_ids
    tokens.ids[:0], tokens.spans[:0], tokens.whole[:0] = start, [-1] * len(start), [False] * len(start)
    return tokens


def _pieces(spans: Sequence[Span], facts: TokenizerFacts, reads_tokens: bool) -> list[list[int]]:
    """Group the indices of spans that are tokenised together.

    A new piece begins at each border of an answer, where the prompt for it ends, and around content that spells out a special token.
    """
    pieces: list[list[int]] = []
    closed = True
    for index, span in enumerate(spans):
        alone = span.message is not None and not reads_tokens and facts.holds_control(span.text)
        joins = index and (spans[index - 1].supervised, spans[index - 1].asked) == (span.supervised, span.asked)
        if joins and not alone and not closed:
            pieces[-1].append(index)
        else:
            pieces.append([index])
        closed = alone or span.ends
    return pieces


def _append(tokens: Tokens, spans: Sequence[Span], piece: list[int], found: list[tuple[int, int, int]]) -> None:
    """Add the tokens (id, start, end) of a piece, each with the span in which it starts."""
    position, end_of_span = 0, len(spans[piece[0]].text)
    for token, start, end in found:
        while start >= end_of_span and position + 1 < len(piece):
            position += 1
            end_of_span += len(spans[piece[position]].text)
        tokens.ids.append(token)
        tokens.spans.append(piece[position])
        tokens.whole.append(end <= end_of_span)


class TokenizerFacts:
    """The facts about a tokenizer that are needed to continue a text. They are found by trial, once per tokenizer.

    Raises `GraftError` for a tokenizer that is not fast or has no end-of-sequence token.
    """

    def __init__(self, tokenizer: Any) -> None:
        if not getattr(tokenizer, "is_fast", False):
            raise GraftError(
                f"{_name(tokenizer)} has no fast (Rust) tokenizer, but only a fast one reports where each token lies in the text"
            )
        if tokenizer.eos_token_id is None:
            raise GraftError(
                f"the tokenizer of {_name(tokenizer)} has no end-of-sequence token, so a trained model could never "
                "stop. Set `eos_token` in its tokenizer_config.json"
            )
        self._call = partial(
            tokenizer, return_offsets_mapping=True, return_attention_mask=False, padding=False, truncation=False,
            verbose=False,
        )  # fmt: skip
        self.eos, self.eos_id = str(tokenizer.eos_token), int(tokenizer.eos_token_id)
        self.start_ids = self._starts()
        controls = {str(token) for token in tokenizer.all_special_tokens}
        controls |= {str(token) for token in tokenizer.added_tokens_decoder.values() if token.special}
        self.controls = sorted(filter(None, controls), key=len, reverse=True)
        """Texts of the special tokens, longest first."""
        # Does "x" at the start of a text become other tokens than "x" after a line end? Then the tokenizer marks the start.
        alone = [token for token, _, _ in self._encode("x")]
        self._marks_start = alone != [token for token, start, _ in self._encode("\nx") if start >= 1]

    def holds_control(self, text: str) -> bool:
        """Whether the text holds a special token."""
        return any(control in text for control in self.controls)

    def encode(self, text: str, before: str = "", as_text: bool = False) -> list[tuple[int, int, int]]:
        """Tokenise `text` as the continuation of `before`, and return (id, start, end) of its tokens.

        as_text: special tokens that the text spells out stay text. Raises `GraftError` if the tokenizer merges every anchor with the text.
        """
        # After a special token (and perhaps spaces) the anchor is that token itself, since some swallow the spaces that follow them.
        stripped = before.rstrip()
        control = next((control for control in self.controls if stripped.endswith(control)), None)
        if control and not as_text:
            anchor = before[len(stripped) - len(control) :]
            found = self._encode(anchor + text)
            width = len(anchor)
            # Usable unless a token after the special one covers both the end of the anchor and the start of the text.
            if not any(len(control) <= start < width < end for _, start, end in found):
                return [(token, start - width, end - width) for token, start, end in found if start >= width]
        if not before or not self._marks_start:
            return self._encode(text, as_text)
        # Otherwise the anchor is any character that the tokenizer does not merge with the start of the text.
        for anchor in "\n.:(":
            found = self._encode(anchor + text, as_text)
            if not any(start < 1 < end for _, start, end in found):
                return [(token, start - 1, end - 1) for token, start, end in found if start >= 1]
        raise GraftError(
            f"this tokenizer cannot continue a text with {text[:40]!r}: it merges the start with the character before"
        )

    def _encode(self, text: str, as_text: bool = False) -> list[tuple[int, int, int]]:
        found = self._call(text, add_special_tokens=False, split_special_tokens=as_text)
        return [(token, *where) for token, where in zip(found["input_ids"], found["offset_mapping"], strict=True)]

    def _starts(self) -> list[int]:
        """Return the tokens that the tokenizer puts before a text."""
        found = self._call("x", add_special_tokens=True, return_special_tokens_mask=True)
        marked = zip(found["input_ids"], found["special_tokens_mask"], strict=True)
        return [token for token, _ in takewhile(lambda pair: pair[1], marked)]


_known: WeakKeyDictionary[Any, tuple[Any, TokenizerFacts]] = WeakKeyDictionary()


def facts_of(tokenizer: Any) -> TokenizerFacts:
    """Return the facts about a tokenizer; they are found once for each state of its special tokens."""
    state = (str(tokenizer.eos_token), tuple(map(str, tokenizer.all_special_tokens)), len(tokenizer))
    known = _known.get(tokenizer)
    if known is None or known[0] != state:
        known = _known[tokenizer] = (state, TokenizerFacts(tokenizer))
    return known[1]


def _name(tokenizer: Any) -> str:
    return getattr(tokenizer, "name_or_path", "") or type(tokenizer).__name__

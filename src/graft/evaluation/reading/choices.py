"""Read the label of the choice that an output takes: a letter, or a word such as answer2 or true.

A label counts where it is said to be the answer: in a box, after #### or "the answer is", before "is correct", after "I choose".
Without such words it counts at the start of the first line or alone in the last one ("(B) 23", "answer2.", "**E**"), unless
other choices are listed like it. Letters must be capitals. A letter before another word is not read ("the answer is A cat"), nor
are two labels at once ("B or C").
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

from graft.evaluation.reading.plain import BOX_CLOSE, BOX_OPEN
from graft.evaluation.reading.statements import segments, statements

_NAMED = r"(?i:options?|choices?|answers?|alternative|letter)"
_QUALITY = r"(?i:correct|right|best|final|most[ ]+\w+|only[ ]+correct|closest|appropriate)"
_BE = r"(?i:is|are|would[ ]+be|should[ ]+be|must[ ]+be|will[ ]+be|being)"
_ADVERB = r"(?:(?i:therefore|thus|clearly|simply|then|indeed|also|still)[ ,]+)?"
_OPENING = rf"[\s\"'(\[:*{BOX_OPEN}]{{0,6}}"
_NOT_CHOICES = [
    "statement",
    "statements",
    "part",
    "case",
    "point",
    "line",
    "angle",
    "figure",
    "type",
    "class",
    "group",
    "team",
    "vitamin",
    "if",
    "whether",
    "not",
    "neither",
    "nor",
    "or",
    "and",
    "only",
    "both",
    "plan",
]
_AFTER_LETTER = re.compile(
    rf"[\"')\]{BOX_CLOSE}]*(?:\s*$|[ \t]*\n|\s*[.,;!?](?!\w)|[:;]|\s*(?:\(|</|{BOX_CLOSE})|\s+[-\d]|\s*[–—]|"
    r"\s+(?:because|since|as|for|is|was|which|with|due|that|where|here|not|option|choice|would|must|should)\b)"
    rf"|[\"')\]{BOX_CLOSE}]*[)\]{BOX_CLOSE}]"
)


def read_choice(output: str, labels: Sequence[str], *, capitals: bool) -> str | None:
    """Return the label that an output takes as its answer, or None.

    labels: all labels that there are. capitals: the labels are capital letters; otherwise case is ignored.
    """
    reader = _Reader(labels, capitals)
    for segment in segments(output):
        found = reader.stated(segment)
        if not found:
            found = reader.alone(segment)
        if found:
            return found[0] if len(found) == 1 else None
    return None


class _Reader:
    """The patterns of one set of labels."""

    def __init__(self, labels: Sequence[str], capitals: bool) -> None:
        one = "|".join(re.escape(label) for label in sorted(labels, key=len, reverse=True))
        one = f"(?:{one})" if capitals else f"(?i:{one})"
        self._known = {label.casefold(): label for label in labels}
        self._capitals = capitals
        self._label = rf"(?:(?i:the[ ]+)?{_NAMED}[ ]+{_OPENING})?(?P<label>{one})(?!\w)"
        self._joined = re.compile(rf"[\"')\].]*\s*\(?(?:,?[ ]*(?i:and|or)\b|[/,&])\s*{_OPENING}{self._label}")
        self._at = re.compile(_OPENING + _ADVERB + _OPENING + self._label)
        self._before = re.compile(
            rf"(?P<word>\b\w+[ ]+)??{_OPENING}{self._label}[\"')\]{BOX_CLOSE}]*[ ]{_BE}[ ]+(?i:therefore|thus|indeed|clearly|also)?[ ]*"
            rf"(?i:(?:the|my)[ ]+)?(?:(?:{_QUALITY}[ ]+)*(?i:answer|option|choice)\b|"
            r"(?i:correct|right)(?i:[ ]one)?(?=\s*(?:[.,;!\n]|$|(?i:because|since|as)\b)))"
        )
        self._chosen = re.compile(
            rf"(?:(?:(?i:my|{_QUALITY})[ ]+){_NAMED}[ ]*(?:(?<=[ ]){_BE}|:)|\b(?i:choose|select|pick|mark|go[ ]+with)\b|"
            rf"\b(?i:matches|match|is|be|gives|to|with)[ ]+(?={_NAMED}[ ]))[ ]*:?{_OPENING}{self._label}"
        )
        self._line = re.compile(rf"(?m)^[\"'(\[>#\- \t]*{self._label}(?:[\"'(]*[)\].:,](?!\w)|[\"')\].]*[ \t]*$)")
        self._bare = re.compile(rf"[>#\-]*{_OPENING}{self._label}[\"')\].!{BOX_CLOSE}\s]*")
        self._bracketed = re.compile(rf"(?<!\w)\(?{self._label}\)")

    def stated(self, segment: str) -> list[str]:
        """Return the label that is stated last, a strong statement before others; two if they are joined by "or"."""
        strong: list[tuple[int, list[str]]] = []
        weak: list[tuple[int, list[str]]] = []
        marked = False
        for each in statements(segment):
            text = each.content if each.kind == "box" else segment[each.end :]
            found = self._taken(text, self._at.match(text))
            if not found or (each.kind == "mark" and marked):
                continue
            found = found * 2 if each.joined else found
            marked = marked or each.kind == "mark"
            (strong if each.strong else weak).append((each.start, found))
        weak += [(place, found) for place, found in self._worded(segment)]
        chosen = strong or weak
        return max(chosen, key=lambda pair: pair[0])[1] if chosen else []

    def _worded(self, segment: str) -> Iterator[tuple[int, list[str]]]:
        for match in self._chosen.finditer(segment):
            if re.search(r"(?i)\b(?:not|n't|cannot)[ ]+$", segment[max(0, match.start() - 8) : match.start()]) is None:
                yield match.start(), self._taken(segment, match)
        for match in self._before.finditer(segment):
            word = (match["word"] or "").strip().lower()
            if word not in _NOT_CHOICES and not self._joined_before(segment, match.start("label")):
                yield match.start("label"), [self._known[match["label"].casefold()]]

    def _joined_before(self, segment: str, place: int) -> bool:
        return (
            re.search(
                r"(?i)\b(?:and|or|if|not|whether)\b[\s\"'(\[]*(?:options?|choices?)?[\s(]*$",
                segment[max(0, place - 24) : place],
            )
            is not None
        )

    def alone(self, segment: str) -> list[str]:
        """Return the label that the first line begins with, or that is the whole last line; two if both lines are labels."""
        lines = [line for line in segment.splitlines() if line.strip()]
        if not lines:
            return []
        listed = {
            match["label"].casefold() for match in (*self._line.finditer(segment), *self._bracketed.finditer(segment))
        }
        first = self._line.match(lines[0])
        if first is not None and len(listed) == 1 and not self._is_heading(first):
            found = self._taken(lines[0], first)
            if len(found) == 1:
                return found
        bare = [self._bare.fullmatch(line) for line in (lines[0], lines[-1])]
        if bare[1] is None:
            return []
        return list(dict.fromkeys(self._known[match["label"].casefold()] for match in bare if match is not None))

    def _is_heading(self, match: re.Match[str]) -> bool:
        """Whether the line begins with "A:", which stands for "Answer:"."""
        return re.fullmatch(r"\W*A\W*:\s*", match[0]) is not None

    def _taken(self, text: str, match: re.Match[str] | None) -> list[str]:
        """Return the label of a match, and another one that is joined to it. Empty if the letter is the start of a text."""
        if match is None:
            return []
        named = re.search(rf"{_NAMED}[ ]", match[0]) is not None and not match[0].lower().startswith("answer")
        if self._capitals and not named and _AFTER_LETTER.match(text, match.end("label")) is None:
            return []
        label = self._known[match["label"].casefold()]
        joined = self._joined.match(text, match.end("label"))
        other = self._known[joined["label"].casefold()] if joined is not None else label
        return [label] if other == label else [label, other]

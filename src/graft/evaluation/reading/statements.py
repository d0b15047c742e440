"""Find the part of an output that counts, and the places where it states its answer.

Thoughts do not count (`thoughts`). Nor does what follows once the model asks itself another question ("Question:", "Problem
2:", "### Instruction:").

An answer is stated in a box, after "####", in <answer> tags, or after words such as "the final answer is". These are strong
statements; "the answer is" and "Answer:" are weaker.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from graft.evaluation.reading.plain import BOX_CLOSE, BOX_OPEN, plain
from graft.evaluation.reading.thoughts import without_thoughts

_ASKS = re.compile(
    r"(?im)^[ \t>*#]*(?:(?:next |new |another )?(?:question|problem|exercise)(?:[ \t]*\d+)?[ \t*]*[:.]|Q(?:[ \t]*\d+)?[ \t*]*:|"
    r"#+[ \t]*(?:instruction|input|question|problem)s?\b[^\n]*$|(?:human|user)[ \t*]*:|<\|im_start\|>|<\|user\|>|\[INST\])"
)
_BRACES = re.compile(r"\\(?:boxed|fbox)(?![A-Za-z])[ ]{0,9}(?:(?P<box>\{)|(?P<bare>[-+]?\w+))|\\.|[{}]")

Kind = Literal["box", "mark", "is", "label"]
"""box; mark: strong, after #### or in tags; is: after "the answer is"; label: after "Answer:", where reasoning may follow."""

_VERB = r"(?:is|are|was|becomes|equals|comes[ ]out[ ]to|(?:would|should|must|will|has[ ]to)[ ]be)\b"
_BETWEEN_BOXES = re.compile(r"(?i)[\s.$]*(?:and|or|,|&|;)\s*(?:[A-Za-z]\s*=\s*)?[\s$]*")
_CUE = re.compile(
    rf"""
    \b(?P<strong>final[ ]+(?:\w+[ ]+)?)?(?P<noun>answers?|ans\b\.?|(?<=final[ ])(?:result|value|solution))
    (?:[ ]+(?:choice|option|value))?
    (?:[ ]+(?:to|for|of|in)[ ][^.\n:=]{{1,80}}?)?
    [ ]*(?:(?P<verb>(?<=[ ]){_VERB}[ ]*:?)|[:=]|(?<=ans\.)(?=[ ]))
    |^[ \t#>]*(?P<heading>final[ ]answer|answer|A[ ]*:)[ \t]*$
    |^[ \t>]*A[ ]*:(?P<short>)
    """,
    re.IGNORECASE | re.MULTILINE | re.VERBOSE,
)
_MARK = re.compile(r"(?m)^[ \t]*####+[ \t]*(?![ \t]*\d+[.)][ \t]+[A-Za-z])|<answer>")


@dataclass(frozen=True)
class Statement:
    """A place where an answer is stated. `end` is where the text of the answer begins in the segment (of a box, where it ends)."""

    kind: Kind
    strong: bool
    start: int
    end: int
    content: str
    """The content of the box, or all that follows the words."""
    joined: bool = False
    """Whether another box with other content comes before this one and a word such as "or"."""


def segments(output: str) -> list[str]:
    """Return the output in plain text, cut where the model asks itself another question. Boxes are marked.

    Empty if the output ends within a thought.
    """
    text = without_thoughts(output)
    if text is None:
        return []
    text = _mark_boxes(text)
    starts = [0, *(found.start() for found in _ASKS.finditer(text)), len(text)]
    return [plain(text[a:b]) for a, b in zip(starts, starts[1:], strict=False) if text[a:b].strip()]


def statements(segment: str) -> Iterator[Statement]:
    """Yield the places of a plain segment where an answer is stated, in their order for each kind."""
    end, before = 0, ""
    for found in re.finditer(f"{BOX_OPEN}([^{BOX_OPEN}{BOX_CLOSE}]*)({BOX_CLOSE}|$)", segment):
        # A box that is not closed was cut off, and its content with it.
        content = found[1].strip() if found[2] else ""
        if found[2] and not content:
            continue
        joined = end > 0 and before != content and _BETWEEN_BOXES.fullmatch(segment, end, found.start()) is not None
        yield Statement("box", True, found.start(), found.end(), content, joined)
        end, before = found.end(), content
    for found in _MARK.finditer(segment):
        yield Statement("mark", True, found.start(), found.end(), segment[found.end() :].partition("</answer>")[0])
    for found in _CUE.finditer(segment):
        kind: Kind = "is" if found["verb"] else "label"
        strong = found["strong"] is not None or (found["heading"] or "").lower().startswith("final")
        yield Statement(kind, strong, found.start(), found.end(), segment[found.end() :])


def _mark_boxes(text: str) -> str:
    """Replace \\boxed{...}, also with braces inside, by its content between the signs of a box."""
    parts: list[str] = []
    open_boxes: list[bool] = []
    end = 0
    for found in _BRACES.finditer(text):
        new = found[0]
        if found["bare"] is not None:  # \boxed 5
            new = BOX_OPEN + found["bare"] + BOX_CLOSE
        elif found["box"] is not None or new == "{":
            open_boxes.append(found["box"] is not None)
            new = BOX_OPEN if open_boxes[-1] else new
        elif new == "}" and open_boxes:
            new = BOX_CLOSE if open_boxes.pop() else new
        parts += [text[end : found.start()], new]
        end = found.end()
    return "".join(parts) + text[end:]

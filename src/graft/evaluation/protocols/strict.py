"""`strict`: the answer that the model ends with, or says it gives; no letter or number picked up on the way there.

- Prompt: the template that the adapter was trained with. Decoding: greedy, ended by the end of the sequence.
- Numbers: the last number, read as people write them (`graft.evaluation.answers`: 1,234 and $5 and 3-5), right within 0.001.
- Choices: what follows the last "answer is" or "answer:"; without these words, an output that begins with the label and a
  bracket, stop or line end ("(B) 23", "answer2."), or whose last line is the label. Letters must be capitals ("the answer is
  a number" chooses nothing); other labels may be written either way. A label is never part of a longer word.
- Classes whose names are not known beforehand: the output as a whole, case and white space aside.
"""

from __future__ import annotations

import re
from decimal import Decimal

from graft.evaluation.answers import extract, normalised
from graft.evaluation.protocols.base import OutputProtocol, Rule, same_text
from graft.evaluation.tasks.base import Task

TOLERANCE = Decimal("0.001")


def number(output: str, task: Task) -> str | None:
    return extract(output, "numeric")


def near(gold: str, extracted: str) -> bool:
    return abs(Decimal(gold) - Decimal(extracted)) <= TOLERANCE


def choice(output: str, task: Task) -> str | None:
    """The label that an output chooses."""
    if not task.labels:
        return normalised(output) or None
    one = "|".join(re.escape(label) for label in sorted(task.labels, key=len, reverse=True))
    label = rf"(?:option |choice )?[\"'*(\[]*({one})"
    case = 0 if task.answer == "letter" else re.IGNORECASE
    stated = re.findall(rf"(?i:\banswer\b(?: choice)?(?:\s+is|\s*:)+)\s*(?i:the )?{label}(?!\w)", output, case)
    begins = re.match(rf"\s*{label}(?=[\"'*]*(?:[)\].:,]|\s*$|\s*\n))", output, case)
    ends = re.search(rf"(?:^|\n)\s*{label}[\"'*)\].]*\s*$", output, case)
    found = stated[-1] if stated else begins[1] if begins else ends[1] if ends else None
    return next((known for known in task.labels if found is not None and known.casefold() == found.casefold()), None)


def same_class(gold: str, extracted: str) -> bool:
    return normalised(gold) == normalised(extracted)


_NUMBER = Rule(number, near, "the last number as graft.evaluation.answers reads it, within 0.001")
_CHOICE = Rule(
    choice, same_text, "the label behind the last 'answer is', at the start before a stop, or as the last line"
)

PROTOCOL = OutputProtocol(
    name="strict",
    version=1,
    rules={
        "number": _NUMBER,
        "letter": _CHOICE,
        "label": _CHOICE,
        "class": Rule(choice, same_class, _CHOICE.text + "; of unknown classes the whole output"),
        "score": _NUMBER,
    },
)

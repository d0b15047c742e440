"""`strict`: the answer that the model states, or that its output ends with. Letters and numbers elsewhere do not count.

- Prompt: the template that the adapter was trained with. Decoding: greedy, up to the end of the sequence.
- Numbers: the last number, as people write them (`graft.evaluation.answers` reads 1,234 and $5 and 3-5), right within 0.001.
- Choices: the label after the last "answer is" or "answer:". Without these words, the label at the start of the output if a
  bracket, punctuation mark or line end follows it ("(B) 23", "answer2."), or the label as the last line. Letters must be
  capitals ("the answer is a number" chooses nothing); other labels may have any case. A label is never part of a longer word.
- Classes with names that are not known in advance: the whole output, ignoring case and white space.
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
    """Return the label that an output chooses, or None."""
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

"""`strict`: the answer that the model states, or that its output ends with. Letters and numbers elsewhere do not count.

- Prompt: the template that the adapter was trained with. Decoding: greedy, up to the end of the sequence.
- Numbers: as `reading.numbers` reads them, right within 0.001.
- Choices: as `reading.choices` reads them. Letters must be capitals; other labels may have any case.
- Classes with names that are not known in advance: the whole output, ignoring case and white space.
- Thoughts do not count, and an output that ends within one is unextractable.
"""

from __future__ import annotations

from fractions import Fraction

from graft.evaluation.answers import extract, normalised
from graft.evaluation.protocols.base import OutputProtocol, extracting, same_text
from graft.evaluation.reading.choices import read_choice
from graft.evaluation.tasks.base import Task

TOLERANCE = Fraction(1, 1000)


def number(output: str, task: Task) -> str | None:
    return extract(output, "numeric")


def near(gold: str, extracted: str) -> bool:
    return abs(Fraction(gold) - Fraction(extracted)) <= TOLERANCE


def choice(output: str, task: Task) -> str | None:
    """Return the label that an output chooses, or None."""
    if not task.labels:
        return extract(output, "exact")
    return read_choice(output, task.labels, capitals=task.answer == "letter")


def same_class(gold: str, extracted: str) -> bool:
    return normalised(gold) == normalised(extracted)


_NUMBER = extracting(number, near, "the number that is stated, else the last one, within 0.001")
_CHOICE = extracting(
    choice, same_text, "the label that is stated, else the one at the start before a stop, or in the last line"
)

PROTOCOL = OutputProtocol(
    name="strict",
    version=2,
    rules={
        "number": _NUMBER,
        "letter": _CHOICE,
        "label": _CHOICE,
        "class": extracting(choice, same_class, _CHOICE.text + "; of unknown classes the whole output"),
        "score": _NUMBER,
    },
)

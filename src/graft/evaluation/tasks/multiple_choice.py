"""The wording that Social IQa, ARC and OpenBookQA share in LLM-Adapters, and the row format of ARC and OpenBookQA."""

from __future__ import annotations

from graft.data.file_readers import Row
from graft.evaluation.tasks.base import ParsedRow
from graft.evaluation.tasks.wording import Wording

ANSWERS = Wording(
    "12345", "answer{}", lead="Please choose the correct answer to the question: ", mark="Answer{}: ",
    tail="\n\nAnswer format: {}",
)  # fmt: skip


def keyed(row: Row, question: str) -> ParsedRow:
    """Parse a row with `choices` {"text": [..], "label": [..]} and `answerKey`, which is one of the labels."""
    choices, key = row["choices"], (row["answerKey"] or "").strip()
    gold = f"answer{choices['label'].index(key) + 1}" if key in choices["label"] else None
    return ParsedRow(question, gold, tuple(choices["text"]))

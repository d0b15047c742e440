"""The wording that Social IQa, ARC and OpenBookQA share in LLM-Adapters, and the row that ARC and OpenBookQA share."""

from __future__ import annotations

from graft.data.file_readers import Row
from graft.evaluation.tasks.base import Asked
from graft.evaluation.tasks.wording import Wording

ANSWERS = Wording(
    "12345", "answer{}", lead="Please choose the correct answer to the question: ", mark="Answer{}: ",
    tail="\n\nAnswer format: {}",
)  # fmt: skip


def keyed(row: Row, question: str) -> Asked:
    """A row with `choices` {"text": [..], "label": [..]} and `answerKey`, which is one of the labels."""
    choices, key = row["choices"], (row["answerKey"] or "").strip()
    gold = f"answer{choices['label'].index(key) + 1}" if key in choices["label"] else None
    return Asked(question, gold, tuple(choices["text"]))

"""The columns of labelled rows: which ones hold the texts, and which one the label.

A raw example (SST-2):

sentence	label
it 's a charming and often affecting journey . 	1
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from graft.data.cells import Row, RowError, kind_of, text
from graft.data.samples import Message
from graft.data.shapes import Shape
from graft.errors import GraftError

TEXTS = (
    ("text", "text_pair"), ("sentence1", "sentence2"), ("premise", "hypothesis"), ("question1", "question2"),
    ("question", "sentence"), ("text_a", "text_b"), ("text",), ("sentence",), ("content",), ("review",),
)  # fmt: skip
"""Sets of columns that may hold the texts; the first set that the source has is taken."""
CHATS = ("messages", "conversations", "conversation")
"""Columns of chat text."""
LABELS = {
    "classification": ("label", "labels", "class", "category", "gold_label", "is_duplicate", "Quality", "target"),
    "regression": ("score", "label", "value", "target", "labels"),
}


def labelled_shape(columns: Iterable[str], wanted: str, source: str, task: str, need_label: bool) -> Shape:
    """Return the shape of a source with these columns. Raises `GraftError` with the columns found and the columns known."""
    found = list(columns)
    if wanted != "auto":
        raise GraftError(
            f"{source}: `format: {wanted}` is for conversations, but rows of a {task} have texts and a label: remove `format`"
        )
    texts = next((names for names in TEXTS if all(name in found for name in names)), None)
    label = next((name for name in LABELS[task] if name in found), None)
    chat = next((name for name in CHATS if name in found), None)
    if texts is None and chat is not None:
        raise GraftError(f"{source}: the rows hold chat text (`{chat}`), but {_plain(task)}")
    missing = "texts" if texts is None else "label" if label is None and need_label else None
    if texts is None or missing:
        known = [" and ".join(names) for names in TEXTS] if texts is None else LABELS[task]
        raise GraftError(
            f"{source}: no column holds the {missing} of a {task}; its columns are {', '.join(found)}. Known are {'; '.join(known)}."
        )

    def convert(row: Row, need_answer: bool) -> list[Message]:
        for name in texts:
            if isinstance(row.get(name), (list, Mapping)):
                raise RowError(name, f"holds chat text ({kind_of(row[name])}), but {_plain(task)}")
        made: list[Message] = [{"role": "user", "content": text(row, name)} for name in texts]
        if label is None or (not need_answer and row.get(label) is None):
            return made
        return [*made, {"role": "assistant", "content": _label(row, label, task)}]

    return Shape((texts,), convert)


def _plain(task: str) -> str:
    """Say what to do with chat text in a task that reads plain text."""
    return (
        f"a {task} reads plain text: write what is to be labelled into a column `text`, such as the user's last turn. To let the model "
        "write the label as its answer, end each conversation with it and leave data.task out"
    )


def _label(row: Row, field: str, task: str) -> str:
    value = row.get(field)
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float) and value.is_integer() and task == "classification":
        value = int(value)
    found = text(row, field).strip() if not isinstance(value, int) else str(value)
    if not found:
        raise RowError(field, "is empty: each row needs a label")
    return found

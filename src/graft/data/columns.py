"""Which columns of a source are read. What nothing reads is named in the report, and refused where it changes what a sample means."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from graft.errors import GraftError


@dataclass
class Seen:
    """What was read of the rows of one source."""

    columns: set[str] = field(default_factory=set)
    """The columns that a conversion asked for."""
    unread: set[str] = field(default_factory=set)
    """Keys inside columns that nothing reads, as `messages[].id`."""


class TrackedRow(Mapping[str, Any]):
    """A row that notes which of its columns are read."""

    def __init__(self, values: Mapping[str, Any], seen: Seen) -> None:
        self._values, self.seen = values, seen

    def __getitem__(self, column: str) -> Any:
        self.seen.columns.add(column)
        return self._values[column]

    def __contains__(self, column: object) -> bool:
        return column in self._values

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)


def is_empty(value: Any) -> bool:
    """Whether a cell holds nothing: null, not a number, an empty text or an empty list."""
    return value is None or (isinstance(value, float) and math.isnan(value)) or value in ("", [], {})


def as_flag(value: Any) -> bool | None:
    """Return a cell that says yes or no as a bool; None if it says neither. 1, 1.0, "1" and "True" say yes."""
    if isinstance(value, str):
        return {"true": True, "1": True, "1.0": True, "false": False, "0": False, "0.0": False}.get(value.lower())
    return bool(value) if isinstance(value, (bool, int, float)) and value in (0, 1) else None


def _trains_less(value: Any) -> bool:
    return not all(
        as_flag(one) for one in (value if isinstance(value, Sequence) and not isinstance(value, str) else [value])
    )


def _always(value: Any) -> bool:
    return True


MEDIA = ("image", "images", "audio", "audios", "video", "videos")
MEANINGFUL: dict[str, tuple[Callable[[Any], bool], str]] = {
    **dict.fromkeys(("tools", "functions"), (_always, "the model would not see the tools that it may call")),
    **dict.fromkeys(MEDIA, (_always, "the model reads text alone")),
    "documents": (_always, "the model would not see the documents"),
    "history": (_always, "the earlier turns would be missing"),
    "chat_template_kwargs": (_always, "arguments of the chat template are the same for all rows"),
    **dict.fromkeys(
        ("weight", "train", "loss_mask", "mask", "loss_weight", "sample_weight", "loss_scale", "completion_mask"),
        (_trains_less, "what it leaves out of the loss would be trained on")
    ),
    **dict.fromkeys(
        ("label", "kto_tag"),
        (
            lambda value: as_flag(value) is not None,
            "bad answers would be learnt; a `label` of single answers is for data.task: preference with train.objective: kto",
        ),
    ),
}  # fmt: skip
"""Columns that change what a sample means, whether a value of them does, and what would be wrong if nothing read them."""

MASKING = tuple(
    name
    for name in MEANINGFUL
    if name not in (*MEDIA, "tools", "functions", "documents", "history", "chat_template_kwargs")
)
"""Those that say what is trained on, so that prompts alone do not need them."""


def check_unread(
    name: str, rows: Sequence[Mapping[str, Any]], seen: Seen, ignored: Sequence[str], harmless: Sequence[str]
) -> list[str]:
    """Return the columns and keys that nothing read, and that are not in `ignored`; columns without any content do not count.

    harmless: columns that never change what is read here. Raises `GraftError` for a column that changes what a sample means.
    """
    columns = dict.fromkeys(column for row in rows for column in row)
    unread = [column for column in columns if column not in seen.columns]
    found = []
    for column in unread:
        changes, what = MEANINGFUL.get(column, (None, ""))
        for number, row in enumerate(rows, start=1):
            value = row.get(column)
            if is_empty(value):
                continue
            if changes is not None and column not in harmless and changes(value):
                raise GraftError(
                    f"{name}, row {number}: nothing reads the column '{column}' here, and {what}. To leave it out on purpose, "
                    f"name it in the source's `ignore`, e.g. train: {{path: {name}, ignore: [{column}]}}"
                )
            if column not in found:
                found.append(column)
            if changes is None:
                break
    return [*found, *sorted(seen.unread - set(ignored))]

"""The cells of a row as text."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from decimal import Decimal
from typing import Any

Row = Mapping[str, Any]


class RowError(ValueError):
    """A row does not have the expected shape."""

    def __init__(self, field: str, problem: str) -> None:
        super().__init__(f"field '{field}': {problem}")


def text(row: Row, field: str, at: str | None = None) -> str:
    """Return a field as text; numbers are written out. `at` names it in errors.

    Raises `RowError` if it is missing, has another type, or holds half of a character (a lone surrogate).
    """
    at = field if at is None else at
    value = row.get(field)
    if value is None or (isinstance(value, float) and math.isnan(value)):
        raise RowError(at, "is missing")
    if isinstance(value, str):
        try:
            value.encode()
        except UnicodeEncodeError as error:
            raise RowError(
                at, f"holds half of a character (the lone surrogate \\u{ord(value[error.start]):04x} at {error.start})"
            ) from None
        return value
    if isinstance(value, float) and math.isinf(value) and not hasattr(value, "written"):
        raise RowError(at, "is infinite, which is no text")
    if isinstance(value, (int, float, Decimal)) and not isinstance(value, bool):
        return str(value)
    turns = (
        isinstance(value, list) and value and isinstance(value[0], dict) and not {"role", "from"}.isdisjoint(value[0])
    )
    raise RowError(
        at,
        f"must be text, but is {kind_of(value)}"
        + (" of chat turns, which belong in a column called messages" if turns else ""),
    )


def parsed(value: Any, start: str = "[{") -> Any:
    """Return what a text holds as JSON, if it begins as a list or a mapping does; any other value as it is."""
    if isinstance(value, str) and value.lstrip()[:1] in tuple(start):
        try:
            return json.loads(value)
        except (ValueError, RecursionError):
            return value
    return value


def kind_of(value: Any) -> str:
    """Return what a value is, in words."""
    names = {str: "text", list: "a list", dict: "a mapping", type(None): "nothing", bool: "true or false"}
    if value == []:
        return "an empty list"
    return names.get(type(value), type(value).__name__)

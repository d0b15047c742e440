"""Numbers in messages: rounded for people, with the noun in the right form."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def counted(number: int, noun: str, plural: str | None = None) -> str:
    """Return a number with its noun: "1 answer", "1,200 answers"."""
    return f"{number:,} {noun if number == 1 else plural or noun + 's'}"


def rounded(value: Any) -> Any:
    """Round a float to four significant digits; anything else stays."""
    return f"{value:.4g}" if isinstance(value, float) else value


def between(interval: Sequence[float] | None, form: str) -> str | None:
    """Write an interval, each bound in the given form: "from -0.35 to 0.25"."""
    return None if interval is None else f"from {form.format(interval[0])} to {form.format(interval[1])}"

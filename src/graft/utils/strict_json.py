"""Read a JSON file of fields that somebody else may have written: each name once, and finite numbers only."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any, NoReturn

from graft.errors import GraftError


def read_object(path: Path) -> dict[str, Any]:
    """Return the fields of a JSON file.

    Raises `GraftError` if the file cannot be read, is no JSON or not a mapping, names a field twice, or holds NaN or infinity.
    """
    try:
        return parse_object(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise GraftError(f"{path} is not JSON: {error}") from error
    except TypeError as error:
        raise GraftError(f"{path} is not a mapping of fields, but {error}") from error
    except (OSError, ValueError, RecursionError) as error:
        raise GraftError(f"{path} cannot be read: {error}") from error


def parse_object(text: str) -> dict[str, Any]:
    """Return the fields of a JSON text. Raises `ValueError` as `read_object` does, and `TypeError` with the type of what is no mapping."""
    found = json.loads(text, parse_constant=_no_number, parse_float=_finite, object_pairs_hook=_once)
    if not isinstance(found, dict):
        raise TypeError(type(found).__name__)
    return found


def _no_number(text: str) -> NoReturn:
    raise ValueError(f"{text} is not a number that JSON has")


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"the number {text} is too large")
    return value


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"the field '{next(name for name in names if names.count(name) > 1)}' is there twice")
    return found

"""Settings that pydantic validates strictly, and pydantic's errors in our words."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, get_args

from pydantic import BaseModel, ConfigDict, ValidationError
from pydantic_core import ErrorDetails

from graft.errors import did_you_mean

_WORDS = {
    "int_type": "must be a whole number",
    "int_from_float": "must be a whole number",
    "int_parsing": "must be a whole number",
    "float_type": "must be a number",
    "float_parsing": "must be a number",
    "finite_number": "must be a finite number",
    "bool_type": "must be true or false",
    "string_type": "must be text",
    "dict_type": "must be a mapping",
    "model_type": "must be a mapping",
    "list_type": "must be a list",
    "tuple_type": "must be a list",
}


class Strict(BaseModel):
    """Settings that cannot be changed. An unknown key is an error, types are not converted ("16" is not a number), numbers are finite."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", strict=True, allow_inf_nan=False, use_attribute_docstrings=True
    )


def requirement(item: ErrorDetails) -> str:
    """Return pydantic's message as a requirement: "must be greater than 0"."""
    if item["type"] in _WORDS:
        return _WORDS[item["type"]]
    message, limits = item["msg"], item.get("ctx", {})
    if item["type"] == "less_than_equal" and limits["le"] >= 1e16:  # pydantic writes all its digits
        return f"must be at most {limits['le']:g}"
    if item["type"] in ("too_short", "too_long") and "field_type" in limits:
        bound = f"at least {limits['min_length']}" if "min_length" in limits else f"at most {limits['max_length']}"
        return f"must hold {bound} values"
    for start in ("Input should be ", "String should ", "List should "):
        if message.startswith(start):
            return "must " + ("be " if start.startswith("Input") else "") + message.removeprefix(start)
    return message[:1].lower() + message[1:]


def short(value: Any) -> str:
    """Return a value for a message, in at most 60 characters."""
    shown = repr(value)
    return shown if len(shown) <= 60 else shown[:57] + "..."


def described(error: ValidationError, fields: Mapping[str, Any]) -> str:
    """Return pydantic's errors as sentences: "rank must be a whole number; given: 'x'". fields: the fields that are allowed."""
    lines: list[str] = []
    wrong: dict[tuple[str, str], list[str]] = {}  # of a union (int | float), pydantic reports one error per member
    for item in error.errors():
        path, allowed = _place(item["loc"], fields)
        field, cause = ".".join(path), item.get("ctx", {}).get("error")
        if item["type"] == "extra_forbidden":
            near = did_you_mean(path[-1], allowed)
            lines.append(f"there is no field '{field}'.{near} There are: {', '.join(allowed)}")
        elif item["type"] == "missing":
            lines.append(f"the field '{field}' is missing")
        elif isinstance(cause, Exception) and not str(cause).startswith("must "):
            lines.append(str(cause))
        else:
            wanted = str(cause) if isinstance(cause, Exception) else requirement(item)
            wrong.setdefault((field, short(item["input"])), []).append(wanted)
    return "; ".join(
        [*lines, *(f"{field} {joined(wanted)}; given: {given}" for (field, given), wanted in wrong.items())]
    )


def _place(where: Sequence[str | int], fields: Mapping[str, Any]) -> tuple[list[str], Mapping[str, Any]]:
    """Return the path to a field in settings inside settings, and the fields that are allowed there. What pydantic says beyond that are
    the members of a union."""
    path, allowed = [str(each) for each in where[:1]], fields
    inner = _settings_in(fields.get(path[0])) if path else None
    for part in where[1:]:
        if inner is None:
            break
        path.append(str(part))
        if isinstance(part, str):
            allowed = inner.model_fields
            inner = _settings_in(allowed.get(part))
    return path, allowed


def _settings_in(field: Any) -> type[BaseModel] | None:
    """Return the settings that a field holds, alone, in a list or besides None; None if it holds none."""
    annotation = getattr(field, "annotation", None)
    kinds = (annotation, *get_args(annotation))
    return next((each for each in kinds if isinstance(each, type) and issubclass(each, BaseModel)), None)


def joined(requirements: Sequence[str]) -> str:
    """Join the requirements of the members of a union: "must be a whole number or a number"."""
    return " or ".join(dict.fromkeys(requirements)).replace(" or must be ", " or ")

"""A copy of a function that sees another object under one of its global names.

Why: a family's attention looks up functions such as `apply_rotary_pos_emb` in the globals of its model file. A change there would reach
every model of this process, so one module gets a copy of its forward: the same code, with globals that differ in this one name.
Breaks: if a model file no longer calls the function by its global name. `global_function` then returns None, and the module keeps its
forward.
"""

from __future__ import annotations

import types
from collections.abc import Callable, Mapping
from typing import Any


def global_function(function: Any, name: str) -> Callable[..., Any] | None:
    """Return the Python function that another one calls by a global name, None if it does not call one."""
    if not isinstance(function, types.FunctionType):
        return None
    if (inner := _decorated(function)) is not None:
        return global_function(inner, name)
    found = function.__globals__.get(name) if name in function.__code__.co_names else None
    return found if isinstance(found, types.FunctionType) else None


def with_globals(function: types.FunctionType, changed: Mapping[str, Any]) -> types.FunctionType:
    """Copy a function, with its decorators. The copy sees the changed globals; all others are those of now."""
    names, closure = {**function.__globals__, **changed}, function.__closure__
    if (inner := _decorated(function)) is not None:
        copied = types.CellType(with_globals(inner, changed))
        names, closure = function.__globals__, tuple(copied if _holds(cell, inner) else cell for cell in closure or ())
    copy = types.FunctionType(function.__code__, names, function.__name__, function.__defaults__, closure)
    copy.__kwdefaults__ = function.__kwdefaults__
    return copy


def _decorated(function: types.FunctionType) -> types.FunctionType | None:
    """Return the function that a decorator has put this one around, None if there is none."""
    inner = getattr(function, "__wrapped__", None)
    held = isinstance(inner, types.FunctionType) and any(_holds(cell, inner) for cell in function.__closure__ or ())
    return inner if held else None


def _holds(cell: types.CellType, inner: types.FunctionType) -> bool:
    try:
        return cell.cell_contents is inner
    except ValueError:  # empty
        return False

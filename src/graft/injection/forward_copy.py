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
    if not isinstance(function, types.FunctionType) or name not in function.__code__.co_names:
        return None
    found = function.__globals__.get(name)
    return found if isinstance(found, types.FunctionType) else None


def with_globals(function: types.FunctionType, changed: Mapping[str, Any]) -> types.FunctionType:
    """Copy a function. The copy sees the changed globals; all others are those of now."""
    names = {**function.__globals__, **changed}
    copy = types.FunctionType(function.__code__, names, function.__name__, function.__defaults__, function.__closure__)
    copy.__kwdefaults__ = function.__kwdefaults__
    return copy

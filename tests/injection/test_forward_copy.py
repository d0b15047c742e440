"""A copy of a function with another global, with and without decorators around it."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest

from graft.injection.forward_copy import global_function, with_globals


def doubled(x: int) -> int:
    return 2 * x


def plain(x: int, *, more: int = 1) -> int:
    return doubled(x) + more


def renames(old: str, new: str) -> Callable[..., Any]:
    """A decorator as transformers has them: the function takes an argument under an old name too."""

    def decorator(function: Callable[..., int]) -> Callable[..., int]:
        @functools.wraps(function)
        def renamed(*args: Any, **kwargs: Any) -> int:
            return function(*args, **{new if key == old else key: value for key, value in kwargs.items()})

        return renamed

    return decorator


@pytest.mark.parametrize(
    "function", [plain, renames("most", "x")(plain), renames("most", "x")(renames("extra", "more")(plain))]
)
def test_a_copy_sees_the_other_function_and_keeps_its_decorators(function: Any) -> None:
    assert global_function(function, "doubled") is doubled and global_function(function, "absent") is None
    copy = with_globals(function, {"doubled": lambda x: 10 * x})
    assert (copy(3), copy(3, more=2), function(3)) == (31, 32, 7)
    if function is not plain:
        assert (copy(most=3), function(most=3)) == (31, 7)


def test_what_a_wrapper_does_not_hold_is_not_copied() -> None:
    function = renames("most", "x")(plain)
    function.__wrapped__ = doubled
    assert global_function(function, "doubled") is None

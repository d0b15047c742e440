"""A config that is another config in all but one attribute: which attention function to call.

Models of one class may share a config object, so writing `_attn_implementation` there would switch a second model along. A shadow shares
the original's attribute dictionary (whatever is set on either is seen by both) and answers `graft_<backend>` to that one question.
"""

from __future__ import annotations

import copy
import functools
from typing import Any

from graft.attention.functions import PREFIX, register


class Shadow:
    """Mark of a shadow; generated classes derive from it and from the config's class."""

    graft_original: Any

    @property
    def _attn_implementation(self) -> str:
        return PREFIX + (self.__dict__.get("_attn_implementation_internal") or "eager")

    @_attn_implementation.setter
    def _attn_implementation(self, value: str | None) -> None:
        self.__dict__["_attn_implementation_internal"] = value.removeprefix(PREFIX) if value else value

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        return shadow_of(copy.deepcopy(self.graft_original, memo))

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        return _rebuild, (self.graft_original,)


@functools.cache
def _shadow_class(base: type) -> type:
    return type(base.__name__, (Shadow, base), {"__slots__": ("graft_original",), "__module__": base.__module__})


def _rebuild(config: Any) -> Any:
    """For unpickling, also in a process that has not registered the functions yet."""
    register()
    return shadow_of(config)


def shadow_of(config: Any) -> Any:
    """A live shadow of a config."""
    if isinstance(config, Shadow):
        return config
    shadow = object.__new__(_shadow_class(type(config)))
    object.__setattr__(shadow, "__dict__", config.__dict__)
    _shadow_class(type(config)).graft_original.__set__(shadow, config)  # pyright: ignore
    return shadow

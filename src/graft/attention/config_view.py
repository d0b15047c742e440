"""A view of a config that differs from it in one attribute: which attention function to call.

Models of one class may share a config object, so a change of `_attn_implementation` would reach all of them. A view shares the attribute
dictionary of its original (what is set on either shows on both) but answers `graft_<backend>` to `_attn_implementation`.
"""

from __future__ import annotations

import copy
import functools
from typing import Any

from graft.attention.functions import PREFIX, register


class ConfigView:
    """The base class of all views. The class of a view derives from this and from the class of its config."""

    graft_original: Any

    @property
    def _attn_implementation(self) -> str:
        return PREFIX + (self.__dict__.get("_attn_implementation_internal") or "eager")

    @_attn_implementation.setter
    def _attn_implementation(self, value: str | None) -> None:
        self.__dict__["_attn_implementation_internal"] = value.removeprefix(PREFIX) if value else value

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        return view_of(copy.deepcopy(self.graft_original, memo))

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        return _rebuild, (self.graft_original,)


@functools.cache
def _view_class(base: type) -> type:
    return type(base.__name__, (ConfigView, base), {"__slots__": ("graft_original",), "__module__": base.__module__})


def _rebuild(config: Any) -> Any:
    """Unpickle a view, perhaps in a process that has not registered the attention functions yet."""
    register()
    return view_of(config)


def view_of(config: Any) -> Any:
    """Return a view of a config; a view is returned as it is."""
    if isinstance(config, ConfigView):
        return config
    view = object.__new__(_view_class(type(config)))
    # The dictionary is shared, so the original must be kept outside of it: in a slot.
    object.__setattr__(view, "__dict__", config.__dict__)
    _view_class(type(config)).graft_original.__set__(view, config)  # pyright: ignore
    return view

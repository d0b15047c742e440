"""A view of a config that differs from it in one attribute: which attention function to call.

Why: transformers reads the name of the attention function from the config, and models of one class may share a config object. A change of
`_attn_implementation` would reach all of them. A view shares the attribute dictionary of its original, so what is set on either shows on
both, but it answers `graft_<backend>` to `_attn_implementation`.
Breaks: if transformers keeps the name under another attribute than `_attn_implementation_internal`, or reads it from elsewhere. Adapters
in attention then have no effect, and the probe after attaching refuses them.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any

PREFIX = "graft_"
"""What the names of Graft's attention functions in transformers begin with."""


class ConfigView:
    """The base class of all views. The class of a view derives from this and from the class of its config."""

    graft_original: Any
    graft_rebuild: Callable[[Any], Any]

    @property
    def _attn_implementation(self) -> str:
        return PREFIX + (self.__dict__.get("_attn_implementation_internal") or "eager")

    @_attn_implementation.setter
    def _attn_implementation(self, value: str | None) -> None:
        self.__dict__["_attn_implementation_internal"] = value.removeprefix(PREFIX) if value else value

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        return type(self).graft_rebuild(copy.deepcopy(self.graft_original, memo))

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        return type(self).graft_rebuild, (self.graft_original,)


@functools.cache
def _view_class(base: type, rebuild: Callable[[Any], Any]) -> type:
    namespace = {
        "__slots__": ("graft_original",), "__module__": base.__module__, "graft_rebuild": staticmethod(rebuild),
    }  # fmt: skip
    return type(base.__name__, (ConfigView, base), namespace)


def view_of(config: Any, rebuild: Callable[[Any], Any]) -> Any:
    """Return a view of a config; a view is returned as it is.

    rebuild: a function at the top of a module that makes the view of a config again, for copies and pickles.
    """
    if isinstance(config, ConfigView):
        return config
    cls = _view_class(type(config), rebuild)
    view = object.__new__(cls)
    # The dictionary is shared, so the original must be kept outside of it: in a slot.
    object.__setattr__(view, "__dict__", config.__dict__)
    cls.graft_original.__set__(view, config)  # pyright: ignore
    return view

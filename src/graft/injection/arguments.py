"""What a call of a transformers forward is given, by name, and the cache among it.

The only place that knows what releases call the cache: `past_key_values` up to transformers 5.23 and `cache` from 5.24 on, which takes the
old name too; `layer_past` in some attention modules, `cache_params` in state-space models.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from graft.injection.substitution import own_class

CACHE_NAMES = ("cache", "past_key_values", "cache_params", "layer_past", "past_key_value")
"""The names of the cache, the newest first."""


def given_to(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of a call of the module's own forward by name, those that its `**kwargs` takes among them."""
    signature = inspect.signature(own_class(module).forward)
    given: dict[str, Any] = {}
    for name, value in signature.bind_partial(module, *args, **kwargs).arguments.items():
        if signature.parameters[name].kind is inspect.Parameter.VAR_KEYWORD:
            given.update(value)
        elif value is not module:
            given[name] = value
    return given


def cache_name(forward: Callable[..., Any]) -> str | None:
    """Which argument of a forward is the cache; None where it names none."""
    parameters = inspect.signature(forward).parameters
    return next((name for name in CACHE_NAMES if name in parameters), None)


def cache_of(given: Mapping[str, Any]) -> Any:
    """The cache among arguments or outputs, under whichever name; None for none."""
    for name in CACHE_NAMES:
        if given.get(name) is not None:
            return given[name]
    return None


def cached_tokens(given: Mapping[str, Any]) -> int:
    """How many tokens the cache among a call's arguments holds already."""
    cache = cache_of(given)
    return 0 if cache is None else int(cache.get_seq_length())

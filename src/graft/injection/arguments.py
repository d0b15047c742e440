"""The arguments of a call by name, and the KV cache among them.

Why: only this file knows what releases of transformers call the cache. It is `past_key_values` up to 5.23 and `cache` from 5.24 on, which
takes the old name too, `layer_past` in some attention modules, and `cache_params` in state-space models.
Breaks: under a new name the cache is not found. Positions and prefixes are then wrong in generation, and the tests of caches fail.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from graft.architectures.walk import own_class

CACHE_NAMES = ("cache", "past_key_values", "cache_params", "layer_past", "past_key_value")
"""The names of the cache, newest first."""


def given_to(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments of a call of the module's own forward by name, including those that go into its `**kwargs`."""
    signature = inspect.signature(own_class(module).forward)
    given: dict[str, Any] = {}
    for name, value in signature.bind_partial(module, *args, **kwargs).arguments.items():
        if signature.parameters[name].kind is inspect.Parameter.VAR_KEYWORD:
            given.update(value)
        elif value is not module:
            given[name] = value
    return given


def cache_name(forward: Callable[..., Any]) -> str | None:
    """Return the name of a forward's cache argument, None if it has none."""
    parameters = inspect.signature(forward).parameters
    return next((name for name in CACHE_NAMES if name in parameters), None)


def cache_of(given: Mapping[str, Any]) -> Any:
    """Return the cache among arguments or outputs, None if there is none."""
    for name in CACHE_NAMES:
        if given.get(name) is not None:
            return given[name]
    return None


def cached_tokens(given: Mapping[str, Any]) -> int:
    """Return the number of tokens in the cache among a call's arguments."""
    cache = cache_of(given)
    return 0 if cache is None else int(cache.get_seq_length())

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
    signature, rest = _signature(own_class(module).forward)
    given = dict(signature.bind_partial(module, *args, **kwargs).arguments)
    given.pop(next(iter(signature.parameters)))
    return given | given.pop(rest, {})


def cache_name(forward: Callable[..., Any]) -> str | None:
    """Which argument of a forward is the cache; None where it names none."""
    parameters = _signature(getattr(forward, "__func__", forward))[0].parameters
    return next((name for name in CACHE_NAMES if name in parameters), None)


def cache_of(given: Mapping[str, Any]) -> Any:
    """The cache among arguments or outputs, under whichever name; None for none."""
    return next((given[name] for name in CACHE_NAMES if given.get(name) is not None), None)


def cached_tokens(given: Mapping[str, Any]) -> int:
    """How many tokens the cache among a call's arguments holds already."""
    cache = cache_of(given)
    return 0 if cache is None else int(cache.get_seq_length())


def _signature(forward: Callable[..., Any]) -> tuple[inspect.Signature, str]:
    """The signature, and the name of its `**kwargs` ("" for none)."""
    signature = inspect.signature(forward)
    rest = (each.name for each in signature.parameters.values() if each.kind is each.VAR_KEYWORD)
    return signature, next(rest, "")

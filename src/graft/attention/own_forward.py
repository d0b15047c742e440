"""What the attention forwards of ours share.

They serve passes with virtual tokens and token-flat ones; the module's own forward serves the rest.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from graft.injection.arguments import cache_of


class OwnForward:
    """Mark of such a mixin. `proof.py` compares what it computes with the module's own forward before anything relies on it."""

    def through_function(self, given: Mapping[str, Any], exact: bool = True) -> tuple[Tensor, Tensor | None]:
        """The module's output by way of the attention function, for the arguments of its own forward by name.

        exact: in the model's own order of operations where keys and values stay as they are, so that off equals base bitwise.
        """
        raise NotImplementedError


def with_past(module: Any, given: Mapping[str, Any], key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """Keys and values behind those of the cache in the call, which takes them in."""
    cache = cache_of(given)
    if cache is None:
        return key, value
    return cache.update(key, value, module.layer_idx)

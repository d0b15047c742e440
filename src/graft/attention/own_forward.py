"""What Graft's own attention forwards share.

They run only with virtual tokens or a padding-free batch; otherwise the module's own forward runs.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from graft.injection.arguments import cache_of


class OwnForward:
    """The base class of these mixins. `proof.py` compares each with the module's own forward before anything relies on it."""

    def through_function(self, given: Mapping[str, Any], exact: bool = True) -> tuple[Tensor, Tensor | None]:
        """Compute the module's output through the attention function. given: the arguments of its own forward, by name.

        exact: keep to the model's own order of operations if nothing is added to keys and values, so that the output is the base's, bit for
        bit.
        """
        raise NotImplementedError


def with_past(module: Any, given: Mapping[str, Any], key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """Add keys and values to the cache in the call, if there is one, and return all of them."""
    cache = cache_of(given)
    if cache is None:
        return key, value
    return cache.update(key, value, module.layer_idx)

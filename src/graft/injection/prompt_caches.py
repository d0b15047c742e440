"""Keys and values of virtual tokens that are kept while the weights they come from stay the same."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from graft.routing.context import PromptCache


class PromptCaches(dict[str, tuple[list[Tensor], list[tuple[int, int]], PromptCache]]):
    """Adapter -> its weights, their versions and places in memory, and the keys and values they gave. A copied model starts empty."""

    def __deepcopy__(self, memo: dict[int, Any]) -> PromptCaches:
        return PromptCaches()

    def __reduce__(self) -> tuple[Any, ...]:
        return PromptCaches, ()

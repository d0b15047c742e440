"""How long a sequence a base takes."""

from __future__ import annotations

from typing import Any

from torch import nn

from graft.state import state_of, unwrapped


def context_length(model: nn.Module, adapter: str | None = None) -> int | None:
    """Tokens that a sequence may have under an adapter (a prefix may take positions of its own); None: no limit."""
    root: Any = unwrapped(model)
    length = getattr(root.config.get_text_config(), "max_position_embeddings", None)
    if length is None or adapter is None:
        return length
    state_of(model).entry(adapter)
    return length - sum(module.__dict__.get("graft_shifts", {}).get(adapter, 0) for module in root.modules())

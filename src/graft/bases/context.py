"""The longest sequence that a base takes."""

from __future__ import annotations

from typing import Any

from torch import nn

from graft.attention.prepending import PrependsPrompts
from graft.injection.state import state_of, unwrapped


def context_length(model: nn.Module, adapter: str | None = None) -> int | None:
    """Return how many tokens a sequence may have with an adapter, or None if there is no limit.

    A prefix or prompt may take positions of its own: with 2048 positions and a prompt of 20 tokens, 2028 are left.
    """
    root: Any = unwrapped(model)
    length = getattr(root.config.get_text_config(), "max_position_embeddings", None)
    if length is not None:
        length -= _unused_positions(root)
    if length is None or adapter is None:
        return length
    state_of(model).adapter(adapter)
    return length - sum(_positions_taken(module, adapter) for module in root.modules())


def _positions_taken(module: nn.Module, adapter: str) -> int:
    """Return how many positions an adapter takes before the sequence. Only modules that assign positions answer more than 0."""
    shift = module.__dict__.get("graft_shifts", {}).get(adapter, 0)
    if not isinstance(module, PrependsPrompts):
        return shift
    container: Any = module._modules["graft"]
    return shift + sum(each.tokens for each in container.hooks.prompts.get(adapter, ()) if not each.after_positions)


def _unused_positions(root: nn.Module) -> int:
    """Return how many positions at the start of the table no token gets: RoBERTa counts from the padding id + 1."""
    for name, module in root.named_modules():
        if name.endswith("position_embeddings") and isinstance(module, nn.Embedding) and module.padding_idx is not None:
            return module.padding_idx + 1
    return 0

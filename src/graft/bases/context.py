"""The longest sequence that a base takes, and which sequences may share a forward pass."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from graft.architectures.positions import first_position
from graft.architectures.rope import company_of
from graft.attention.leading import LeadsWithPrompts
from graft.attention.prepending import PrependsPrompts
from graft.injection.state import state_of, unwrapped


def context_length(model: nn.Module, adapter: str | None = None) -> int | None:
    """Return how many tokens a sequence may have with an adapter, or None if there is no limit.

    A prefix or prompt may take positions of its own: with 2048 positions and a prompt of 20 tokens, 2028 are left.
    """
    root: Any = unwrapped(model)
    length = getattr(root.config.get_text_config(), "max_position_embeddings", None)
    if length is not None:
        length -= first_position(root)
    if length is None or adapter is None:
        return length
    return length - positions_taken(root, adapter)


def classes_of(
    model: nn.Module, lengths: Sequence[int], adapters: Sequence[str | None]
) -> list[tuple[int, ...]] | None:
    """Return a class for each row of a batch, so that only rows of one class may share a pass; None if all rows may.

    lengths: tokens of each row. adapters: the adapter of each row. See `Company`.
    """
    root = unwrapped(model)
    company = company_of(root)
    if not company:
        return None
    taken = {name: 0 if name is None else positions_taken(root, name) for name in set(adapters)}
    return [company.of(length + taken[name]) for length, name in zip(lengths, adapters, strict=True)]


def positions_taken(root: nn.Module, adapter: str) -> int:
    """Return how many positions an adapter takes before the sequence."""
    state_of(root).served(adapter)
    return sum(_positions_taken(module, adapter) for module in root.modules())


def _positions_taken(module: nn.Module, adapter: str) -> int:
    """Return how many positions an adapter takes before the sequence. Only modules that assign positions answer more than 0."""
    shift = module.__dict__.get("graft_shifts", {}).get(adapter, 0)
    if not isinstance(module, PrependsPrompts | LeadsWithPrompts):
        return shift
    container: Any = module._modules["graft"]
    return shift + sum(each.tokens for each in container.hooks.prompts.get(adapter, ()) if not each.after_positions)

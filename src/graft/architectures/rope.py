"""Rotary embeddings whose frequencies depend on the longest sequence of a pass: LongRoPE and dynamic NTK.

Why: transformers turns a whole pass by the long factors as soon as one position in it is beyond the original length, and dynamic NTK
turns it by the length of the longest row, or of a longer pass before. A row's result would depend on its company and on the past. So such
rows do not share a pass, and what a module remembers of earlier passes is forgotten.
Breaks: without the attributes `rope_type` and `original_max_seq_len` of rotary modules, rows share passes again.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from graft.architectures.walk import base_modules


@dataclass(frozen=True)
class Company:
    """Which rows may share a pass: those of one class."""

    switches: tuple[int, ...] = ()
    """Lengths above which LongRoPE takes the long factors."""
    grows: tuple[int, ...] = ()
    """Lengths above which dynamic NTK takes other frequencies for every length."""

    def __bool__(self) -> bool:
        return bool(self.switches or self.grows)

    def of(self, length: int) -> tuple[int, ...]:
        """Return the class of a row. length: of the row, with the positions that virtual tokens take before it."""
        return (*(int(length > limit) for limit in self.switches), *(max(length, limit) for limit in self.grows))

    def crosses(self, length: int, more: int) -> bool:
        """Whether a row changes its class while it grows by `more` tokens."""
        return self.of(length) != self.of(length + more)

    def restarts(self, length: int) -> bool:
        """Whether LongRoPE takes the long factors for a row of this length and not for a shorter one, so that its keys are made anew."""
        return any(length == limit + 1 for limit in self.switches)


def company_of(model: nn.Module) -> Company:
    """Return which rows of a model may share a pass."""
    switches: set[int] = set()
    grows: set[int] = set()
    for module, rope_type, layer_type in _rotary(model):
        if "dynamic" in rope_type:
            grows.add(int(module.original_max_seq_len))
        elif rope_type == "longrope":
            settings = module.config.rope_parameters
            settings = settings if layer_type is None else settings[layer_type]
            switches.add(int(settings["original_max_position_embeddings"]))
    return Company(tuple(sorted(switches)), tuple(sorted(grows)))


def forget_lengths(model: nn.Module) -> None:
    """Let dynamic NTK start from its original frequencies: it keeps those of the longest pass so far."""
    for module, rope_type, layer_type in _rotary(model):
        prefix = "" if layer_type is None else f"{layer_type}_"
        if "dynamic" in rope_type and hasattr(module, f"{prefix}original_inv_freq"):
            original = getattr(module, f"{prefix}original_inv_freq")
            device = getattr(module, f"{prefix}inv_freq").device
            module.register_buffer(f"{prefix}inv_freq", original.to(device), persistent=False)
            setattr(module, f"{prefix}max_seq_len_cached", module.original_max_seq_len)


def _rotary(model: nn.Module) -> list[tuple[Any, str, str | None]]:
    """Return (module, kind, layer type or None) of each kind of rotary embedding in a model."""
    found: list[tuple[Any, str, str | None]] = []
    for _, module in base_modules(model):
        kinds: Any = getattr(module, "rope_type", None)
        if isinstance(kinds, str):
            found.append((module, kinds, None))
        elif isinstance(kinds, dict):
            found += [(module, kind, layer_type) for layer_type, kind in kinds.items() if isinstance(kind, str)]
    return found

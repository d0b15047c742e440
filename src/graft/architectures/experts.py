"""Experts that are stored as three-dimensional parameters: the parts that a module has, and their sizes."""

from __future__ import annotations

from torch import nn

PARTS = {"gate_up": "gate_up_proj", "up": "up_proj", "down": "down_proj"}
"""What follows `experts.` in a site's name -> the parameter."""


def expert_parts(module: nn.Module) -> list[str]:
    """Return the parts of a module that are experts' weights, none for other modules."""
    found = [part for part, name in PARTS.items() if module._parameters.get(name) is not None]
    whole = len(found) > 1 and all(module.get_parameter(PARTS[part]).dim() == 3 for part in found)
    return found if whole else []


def expert_sizes(module: nn.Module, part: str, hidden: int) -> tuple[int, int, int, bool]:
    """Return E, I and O of a part, and whether it is stored [E, I, O] instead of [E, O, I].

    hidden: the width of the residual stream, which tells I from O. E.g. up_proj [8, 64, 256] with hidden 64 is [E, I, O].
    If I equals O, the module's `is_transposed` decides.
    """
    experts, first, second = module.get_parameter(PARTS[part]).shape
    outside = first if part == "down" else second  # the stream's width, where stored [E, O, I]
    transposed = outside != hidden if first != second else bool(getattr(module, "is_transposed", False))
    return (experts, first, second, True) if transposed else (experts, second, first, False)

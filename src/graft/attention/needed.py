"""Whether an attention forward of our own is needed for the pass in effect."""

from __future__ import annotations

from typing import Any

import torch

from graft.attention.functions import current_pass


def needed(module: Any) -> bool:
    """True for a token-flat pass, or when an adapter that takes part has virtual tokens here."""
    table = getattr(module._modules.get("graft"), "attention", {})
    if torch.compiler.is_compiling():
        return bool(table)
    if module.__dict__["graft_state"].merged is not None:
        return False
    pass_ = current_pass(module)
    return pass_.flat or any(name in pass_.names for name in table)

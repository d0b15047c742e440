"""The module that owns a stack of blocks: it embeds, runs the blocks, and returns the last hidden states."""

from __future__ import annotations

import inspect
from typing import Any

from torch import nn

from graft.architectures.walk import own_class


def owner_of(root: nn.Module, path: str) -> Any:
    """Return the nearest module around a block that takes embeddings, None if there is none."""
    while path:
        path = path.rpartition(".")[0]
        module = root.get_submodule(path)
        if "inputs_embeds" in inspect.signature(own_class(module).forward).parameters:
            return module
    return None

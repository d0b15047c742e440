"""Where a model's positions start: RoBERTa and its relatives count from the padding id + 1, all others from 0."""

from __future__ import annotations

from torch import nn

from graft.architectures.walk import base_modules


def first_position(root: nn.Module) -> int:
    """Return the position of a row's first token, which is also how many positions of the table no token gets."""
    for path, module in base_modules(root):
        if path.endswith("position_embeddings") and isinstance(module, nn.Embedding) and module.padding_idx is not None:
            return module.padding_idx + 1
    return 0

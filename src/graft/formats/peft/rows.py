"""What a PEFT folder says of the rows of its base's tables."""

from __future__ import annotations

from pathlib import Path

from torch import nn

from graft.formats.foreign import read_config
from graft.formats.peft.file import PeftFile
from graft.formats.peft.tied import ends

WHOLE = ("weight", "base_layer.weight", "token_adapter.base_layer.weight", "lora_B.weight")
"""Names of tensors, after a table's path, with a row for each token."""


def table_heights(folder: Path, model: nn.Module) -> set[int]:
    """Return the numbers of rows of the whole tables, and of the LoRAs at tables, that a folder holds."""
    tensors = PeftFile(folder, model).left
    found = {len(tensors[f"{path}.{name}"]) for path in ends(model) for name in WHOLE if f"{path}.{name}" in tensors}
    inside = {f"{path}.lora_embedding_A" for path in ends(model)}
    return found | {tensors[name].shape[1] for name in inside & tensors.keys()}


def trained_tokens(folder: Path) -> list[int]:
    """Return the ids of the tokens with trained rows, of all tables."""
    config = read_config(folder)
    given = config.get("trainable_token_indices") or config.get("token_indices") or []
    return [token for ids in given.values() for token in ids] if isinstance(given, dict) else list(given)

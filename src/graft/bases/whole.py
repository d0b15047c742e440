"""Write a base whose own weights were trained as an ordinary model of transformers."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from graft.bases.loading import Base


def write_model(base: Base, folder: Path, weights: Mapping[str, Tensor] | None = None) -> None:
    """Write config, weights and tokenizer into an empty folder, as `from_pretrained` reads them.

    weights: the state dict, where the model's own parameters do not hold it.
    """
    base.model.save_pretrained(folder, state_dict=None if weights is None else dict(weights))
    base.tokenizer.save_pretrained(folder)

"""Write a base whose own weights were trained as an ordinary model of transformers."""

from __future__ import annotations

from pathlib import Path

from graft.bases.loading import Base


def write_model(base: Base, folder: Path) -> None:
    """Write config, weights and tokenizer into an empty folder, as `from_pretrained` reads them."""
    base.model.save_pretrained(folder)
    base.tokenizer.save_pretrained(folder)

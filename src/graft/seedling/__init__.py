"""Seedling: the small LLaMA-architecture base that ships with Graft, so that trying Graft needs no download.

A few million parameters with a tokenizer of its own (numbers from 0 to 99 are single tokens), pretrained on generated English
stories and number facts; see `recipes/seedling` in the source tree. It is a base to fine-tune, not a model to talk to.

    model = AutoModelForCausalLM.from_pretrained(graft.seedling.path())
"""

from __future__ import annotations

from pathlib import Path

__all__ = ["path"]


def path() -> Path:
    """The folder with config, weights (safetensors) and tokenizer, as `from_pretrained` reads it.

    Raises FileNotFoundError where the installation lacks the files.
    """
    folder = Path(__file__).parent / "model"
    if not (folder / "model.safetensors").is_file():
        raise FileNotFoundError(
            f"the seedling model is missing from this installation: no model.safetensors in {folder}"
        )
    return folder

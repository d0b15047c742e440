"""Seedling: a small base with the LLaMA architecture that comes with Graft, so that Graft can be tried without a download.

It has a few million parameters and a tokenizer of its own (numbers from 0 to 99 are single tokens). It was pretrained on generated
English stories and number facts; see `recipes/seedling` in the source tree. It is a base to fine-tune, not a model to talk to.

    model = AutoModelForCausalLM.from_pretrained(graft.seedling.path())
"""

from __future__ import annotations

from pathlib import Path

__all__ = ["path"]

FOLDER = Path(__file__).parent / "model"
"""Where the model lies, if the installation has it."""


def path() -> Path:
    """Return the folder with config, weights (safetensors) and tokenizer, as `from_pretrained` reads it.

    Raises FileNotFoundError if the installation lacks the files.
    """
    if not (FOLDER / "model.safetensors").is_file():
        raise FileNotFoundError(
            f"the seedling model is missing from this installation: no model.safetensors in {FOLDER}"
        )
    return FOLDER

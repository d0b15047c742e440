"""What other trainers see of a grafted model: transformers' Trainer and TRL save the adapter and not the base.

A checkpoint folder that they write holds `model.safetensors` with the adapter's tensors and our config beside it; they resume
from it and load the best model by the state dict's names, which is why it is not called `adapter_model.safetensors` there.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from graft.errors import GraftError
from graft.substitution import register_mixin


@register_mixin
class SavesAdapter:
    """Mixin for the root of a `PreTrainedModel`."""

    def save_pretrained(self: Any, save_directory: str | Path, is_main_process: bool = True, **kwargs: Any) -> None:
        """Write the trained adapter as `model.safetensors` with its config. kwargs of other writers (state_dict, ...) are accepted."""
        from graft.checkpoint import save_for_trainer

        if kwargs.get("push_to_hub"):
            raise GraftError(
                "push_to_hub from a grafted model is not supported: use graft.save and upload that folder, or graft.merge first"
            )
        if is_main_process:
            save_for_trainer(self, Path(save_directory), kwargs.get("state_dict"))

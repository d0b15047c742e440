"""Graft under other trainers: transformers' Trainer and TRL save the adapter and not the base.

The checkpoints that they write hold the adapter's tensors in `model.safetensors`, and Graft's config beside it. The name differs from that
in an adapter folder, because a Trainer resumes from this file, by the names of the state dict.
A callback does what a kind has to do once per step (AdaLoRA).
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from graft.attaching.parameters import after_step, parameters, penalty
from graft.errors import GraftError
from graft.injection.state import state_of
from graft.injection.substitution import register_mixin

if TYPE_CHECKING:
    from transformers import TrainerCallback


@register_mixin
class SavesAdapter:
    """Mixin for the root of a `PreTrainedModel`: saves the adapters in place of the model."""

    def save_pretrained(self: Any, save_directory: str | Path, is_main_process: bool = True, **kwargs: Any) -> None:
        """Write the adapters as `model.safetensors` with their config; of a model with a merged adapter, write the whole merged model.

        Other arguments of transformers' `save_pretrained` are accepted.
        """
        from graft.attaching.saving import save_for_trainer, without_adapters

        if state_of(self).merged is not None:
            given = without_adapters(self, kwargs.pop("state_dict", None))
            super().save_pretrained(save_directory, is_main_process, state_dict=given, **kwargs)  # pyright: ignore
            return
        if kwargs.get("push_to_hub"):
            raise GraftError(
                "push_to_hub from a model with adapters is not supported: use graft.save and upload that folder, or graft.merge first"
            )
        if is_main_process:
            save_for_trainer(self, Path(save_directory), kwargs.get("state_dict"))


def callback() -> TrainerCallback:
    """Return the callback for kinds that need more than a loss (AdaLoRA): `Trainer(model, ..., callbacks=[graft.callback()])`.

    It works with TRL's trainers too, and does nothing for other kinds. Once per optimizer step, whatever the accumulation, it adds the
    gradient of the adapter's penalty (`graft.penalty`) to that of the loss before clipping, and lets the adapter act after the step
    (`graft.after_step`). The loss that the Trainer logs is without the penalty. Training raises `GraftError` if the run has too few steps
    for the kind's schedule, and under fp16, where the Trainer would scale the loss but not the penalty: train in bf16 or fp32.
    """
    from transformers import TrainerCallback

    class Steps(TrainerCallback):
        def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
            for name in state_of(model).trained:
                if args.fp16 and penalty(model, name) is not None:
                    raise GraftError(
                        f"adapter '{name}' has a penalty, which the Trainer does not scale under fp16: set bf16=True, or neither"
                    )

        def on_step_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
            for name in state_of(model).trained:
                _add_gradient(model, name)

        def on_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
            for name in state_of(model).trained:
                after_step(model, name, state.global_step + 1, state.max_steps)

    return Steps()


def _add_gradient(model: nn.Module, name: str) -> None:
    """Add the gradient of the penalty. `autograd.grad` does not call the hooks of DDP, which wait for the gradients of the loss only."""
    term = penalty(model, name)
    if term is None:
        return
    trained = [parameter for _, parameter in parameters(model, name) if parameter.requires_grad]
    for parameter, grad in zip(trained, torch.autograd.grad(term, trained, allow_unused=True), strict=True):
        if grad is not None:
            parameter.grad = grad if parameter.grad is None else parameter.grad + grad

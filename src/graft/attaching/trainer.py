"""What other trainers see of a grafted model: transformers' Trainer and TRL save the adapter and not the base.

A checkpoint folder that they write holds `model.safetensors` with the adapter's tensors and our config beside it; they resume
from it and load the best model by the state dict's names, which is why it is not called `adapter_model.safetensors` there.
What a kind does once per step (AdaLoRA) they do with a callback.
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
    """Mixin for the root of a `PreTrainedModel`."""

    def save_pretrained(self: Any, save_directory: str | Path, is_main_process: bool = True, **kwargs: Any) -> None:
        """Write the trained adapter as `model.safetensors` with its config. kwargs of other writers (state_dict, ...) are accepted."""
        from graft.attaching.saving import save_for_trainer

        if kwargs.get("push_to_hub"):
            raise GraftError(
                "push_to_hub from a grafted model is not supported: use graft.save and upload that folder, or graft.merge first"
            )
        if is_main_process:
            save_for_trainer(self, Path(save_directory), kwargs.get("state_dict"))


def callback() -> TrainerCallback:
    """For kinds that need more than a loss (AdaLoRA): `Trainer(model, ..., callbacks=[graft.callback()])`, TRL's trainers too.

    Once per optimiser step, whatever the accumulation, it adds the gradient of the adapter's penalty (`graft.penalty`) to those of the
    loss, before they are clipped, and lets the adapter act on the step taken (`graft.after_step`). The loss that the Trainer logs is
    without the penalty. Other kinds are left as they are. Training raises `GraftError` for a schedule that the run's steps leave no room,
    and under fp16, where the Trainer scales the loss and not the penalty: train in bf16 or fp32.
    """
    from transformers import TrainerCallback

    class Steps(TrainerCallback):
        def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
            for name in state_of(model).trained:
                if args.fp16 and penalty(model, name) is not None:
                    raise GraftError(
                        f"adapter '{name}' has a penalty, which the Trainer's scaling of fp16 does not reach: set bf16=True, or neither"
                    )

        def on_step_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
            for name in state_of(model).trained:
                _add_gradient(model, name)

        def on_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
            for name in state_of(model).trained:
                after_step(model, name, state.global_step + 1, state.max_steps)

    return Steps()


def _add_gradient(model: nn.Module, name: str) -> None:
    """The penalty's gradient, past the hooks of DDP, which waits for those of the loss alone and averages the sum of both."""
    term = penalty(model, name)
    if term is None:
        return
    trained = [parameter for _, parameter in parameters(model, name) if parameter.requires_grad]
    for parameter, grad in zip(trained, torch.autograd.grad(term, trained, allow_unused=True), strict=True):
        if grad is not None:
            parameter.grad = grad if parameter.grad is None else parameter.grad + grad

"""A tenant of a session: one adapter with its optimiser and the gradients that it has so far. It knows nothing of the other tenants."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor
from torch.autograd.graph import increment_version
from torch.optim import AdamW

from graft.attaching.parameters import summed_penalty
from graft.attaching.saving import save
from graft.errors import GraftError
from graft.training.checkpoints import ADAPTER, OPTIMISER, with_prefix
from graft.training.tensor_files import load_tensors, save_tensors
from graft.training.trainable import TrainedAdapter
from graft.training.updates.states import optimizer_tensors, restore_optimizer
from graft.utils.files import new_dir

STATE = "training_state.safetensors"
"""Beside a saved adapter: its tensors as they train, its optimiser, its step."""
STEP = "step"


@dataclass(frozen=True)
class AdamSettings:
    """One step of AdamW. They may differ from step to step."""

    learning_rate: float = 1e-4
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-12
    weight_decay: float = 0.0
    grad_clip_norm: float = 0.0
    """Largest norm of the gradient; 0 is no limit."""

    def check(self) -> None:
        """Raise `GraftError` for a value out of range."""
        for name, value in vars(self).items():
            high = 1.0 if name.startswith("beta") else math.inf
            if not 0.0 <= value < high:
                raise GraftError(f"{name} is {value}: allowed is 0 <= {name} < {high:g}")


@dataclass(eq=False)
class Tenant:
    """One adapter in training."""

    name: str
    trainable: TrainedAdapter
    seed: int
    """Of its dropout."""
    longest: int | None
    """Tokens that a sequence may have; None if there is no limit."""
    step: int = 0
    """Updates so far."""
    asks: int = 0
    """Asks for gradients since the last update."""
    sums: dict[str, Tensor] = field(default_factory=dict)
    """The gradients so far, by parameter; parameters without one are missing."""

    def __post_init__(self) -> None:
        groups = self.trainable.groups(1.0)
        self.factors: list[float] = [group["lr"] for group in groups]
        """The factor of the learning rate of each group of the optimiser."""
        self.optimizer = AdamW(groups, fused=True)

    def take(self) -> None:
        """Add the gradients that a pass left in the parameters to the sums. Raises `GraftError` if they are not finite, and drops them."""
        grads = {key: each.grad for key, each in self.trainable.params.items() if each.grad is not None}
        self.drop()
        if not all(bool(torch.isfinite(grad).all()) for grad in grads.values()):
            raise GraftError("the gradient is not finite; it was dropped")
        for key, grad in grads.items():
            self.sums[key] = self.sums[key] + grad if key in self.sums else grad
        self.asks += 1

    def drop(self) -> None:
        """Drop the gradients that a pass left in the parameters."""
        self.optimizer.zero_grad(set_to_none=True)

    def update(self, settings: AdamSettings) -> dict[str, float]:
        """Take one step of AdamW on the sums and clear them; returns what is known of the step. Without gradients nothing changes.

        Raises `GraftError` for settings out of range, and for a sum that is not finite, which is dropped.
        """
        settings.check()
        if not self.asks:
            return {"asks": 0.0, "step": float(self.step)}
        params, asks = self.trainable.params, self.asks
        for key, parameter in params.items():
            parameter.grad = self.sums.get(key)
        self.sums, self.asks = {}, 0
        try:
            if (penalty := summed_penalty(self.trainable.modules)) is not None:
                penalty.backward()
            norm = self._clip(settings.grad_clip_norm)
            for group, factor in zip(self.optimizer.param_groups, self.factors, strict=True):
                group["lr"], group["betas"] = settings.learning_rate * factor, (settings.beta1, settings.beta2)
                group["eps"], group["weight_decay"] = settings.eps, settings.weight_decay
            self.optimizer.step()
            # A fused step does not raise the versions of parameters, by which values kept from before it are known to be stale.
            increment_version(params.values())
            self.step += 1
            for module in self.trainable.modules:
                module.after_step(self.step, self.step)
        finally:
            self.drop()
        return {"asks": float(asks), "step": float(self.step), "grad_norm": norm}

    def _clip(self, most: float) -> float:
        """Clip the gradients to a norm, if it is not 0; returns the norm from before. Raises `GraftError` if it is not finite."""
        given = [each for each in self.trainable.params.values() if each.grad is not None]
        total = torch.nn.utils.get_total_norm([each.grad for each in given if each.grad is not None])
        if not math.isfinite(norm := float(total)):
            raise GraftError("the sum of the gradients is not finite; it was dropped")
        if most:
            torch.nn.utils.clip_grads_with_norm_(given, most, total)
        return norm

    def save(self, folder: Path, optimizer: bool = True) -> None:
        """Write an ordinary adapter folder. optimizer: with what training needs to go on."""
        with new_dir(folder) as fresh:
            save(self.trainable.model, self.name, fresh)
            if optimizer:
                state = {ADAPTER + key: value for key, value in self.trainable.state().items()}
                moments = optimizer_tensors(self.optimizer, list(self.trainable.params))
                state |= {OPTIMISER + key: value for key, value in moments.items()}
                save_tensors({**state, STEP: torch.tensor(self.step)}, fresh / STATE)

    def load(self, folder: Path, optimizer: bool = True) -> None:
        """Go on where `save` left a tenant with the same adapter, without its gradients. optimizer: with its moments and its step.

        Raises `GraftError` for a folder without a training state, and for tensors of another adapter.
        """
        if not (folder / STATE).exists():
            raise GraftError(f"{folder} has no {STATE}: it was saved without what training needs to go on")
        found = load_tensors(folder / STATE)
        self.trainable.restore(with_prefix(found, ADAPTER))
        self.optimizer.state.clear()
        self.step, self.asks, self.sums = 0, 0, {}
        if optimizer:
            restore_optimizer(self.optimizer, list(self.trainable.params), with_prefix(found, OPTIMISER))
            self.step = int(found[STEP])

"""Lion (Chen et al. 2023, arXiv 2302.06675): the sign of an average of gradients.

c = b1 m + (1 - b1) g          the update's average
w = w - lr (sign(c) + decay w)
m = b2 m + (1 - b2) g          the average that is kept
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.optim import Optimizer


class Lion(Optimizer):
    """Lion with decoupled weight decay. It keeps one tensor per parameter, `exp_avg`."""

    def __init__(self, params: Any, lr: float, betas: tuple[float, float] = (0.9, 0.99), weight_decay: float = 0.0):
        super().__init__(params, {"lr": lr, "betas": betas, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Take one step."""
        loss = None if closure is None else torch.enable_grad()(closure)()
        for group in self.param_groups:
            (beta1, beta2), lr, decay = group["betas"], group["lr"], group["weight_decay"]
            for parameter in group["params"]:
                grad, state = parameter.grad, self.state[parameter]
                if grad is None:
                    continue
                if not state:
                    state["exp_avg"] = torch.zeros_like(parameter)
                update = torch.lerp(grad, state["exp_avg"], beta1).sign_()
                parameter.mul_(1 - lr * decay).add_(update, alpha=-lr)
                state["exp_avg"].lerp_(grad, 1 - beta2)
        return loss

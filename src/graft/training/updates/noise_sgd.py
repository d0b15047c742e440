"""Gradient descent along noise (Malladi et al. 2023, arXiv 2305.17333): the gradient is known by its slopes along random directions alone.

g_i = (L(w + e z_i) - L(w - e z_i)) / 2e         a slope, from two forward passes
w = w - lr (mean_i g_i z_i + decay w)            with the same noise z_i, made again from its key
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from graft.config.methods import MeZOMethod
from graft.training.updates.noise import add_noise_, step_key


class NoiseSGD(Optimizer):
    """Moves parameters along noise, for a pass and for good. It keeps no state."""

    def __init__(self, params: Any, lr: float, weight_decay: float, method: MeZOMethod):
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay})
        self.method = method
        self.slopes: dict[int, float] = {}
        """The slope along the noise of each key, for the next step."""
        self.key: Callable[[int, int, int], int] = step_key
        """Names the noise of (seed, step, direction)."""

    @contextmanager
    def moving(self, key: int) -> Iterator[Callable[[int], None]]:
        """Yield a function that puts the parameters at w + e z (1) or w - e z (-1). They come back at the end, also after an error.

        They come back bit for bit from a copy; where `restore` is subtract, up to rounding.
        """
        copies, at = self._copies(), 0

        def move(side: int) -> None:
            nonlocal at
            for index, parameter in self._numbered():
                if copies:
                    parameter.copy_(copies[index])
                    add_noise_(parameter, side * self.method.epsilon, key, index)
                else:
                    add_noise_(parameter, (side - at) * self.method.epsilon, key, index)
            at = side

        try:
            yield move
        finally:
            with torch.no_grad():
                for index, parameter in self._numbered():
                    if copies:
                        parameter.copy_(copies[index])
                    elif at:
                        add_noise_(parameter, -at * self.method.epsilon, key, index)

    def _copies(self) -> Sequence[Tensor]:
        kept = self.method.restore == "copy"
        return [parameter.detach().clone() for _, parameter in self._numbered()] if kept else []

    def _numbered(self) -> Iterator[tuple[int, Tensor]]:
        return enumerate(parameter for group in self.param_groups for parameter in group["params"])

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Take one step along `slopes`."""
        assert closure is None
        rates = [(group["lr"], group["weight_decay"]) for group in self.param_groups for _ in group["params"]]
        for index, parameter in self._numbered():
            lr, decay = rates[index]
            if decay:
                parameter.mul_(1 - lr * decay)
            for key, slope in self.slopes.items():
                add_noise_(parameter, -lr * slope / len(self.slopes), key, index)
        self.slopes = {}
        return None

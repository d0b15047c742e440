"""QFT (Li et al. 2023, arXiv 2310.07147): Lion on weights, gradients and momenta in 8 bits.

In backward, each layer's gradient is rounded to 8 bits and pushed on a stack; the step pops them, last layer in first layer out.

c = b1 m + (1 - b1) g
w = w - lr (sign(c) + decay w)      on dequantised values, then rounded stochastically
m = b2 m + (1 - b2) g
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from graft.training.updates.int8 import from_int8, to_int8
from graft.training.updates.int8_layers import Held

_DOMAIN = 0x514654
"""Keeps these random numbers apart from others that come from the same seed and step."""
_UPDATE, _REFRESH = 0, 1


class QFTLion(Optimizer):
    """Lion over weights in 8 bits, and over the other parameters (norms, biases) in their own format with a momentum in float32."""

    def __init__(self, params: Any, lr: float, betas: tuple[float, float], weight_decay: float, seed: int):
        super().__init__(params, {"lr": lr, "betas": betas, "weight_decay": weight_decay})
        self.seed, self.held = seed, dict[nn.Parameter, Held]()
        self.numbers = {each: at for at, each in enumerate(p for group in self.param_groups for p in group["params"])}
        self.stack: list[tuple[Held, Tensor, Tensor]] = []
        """(weight, codes and scale of its gradient) in the order of backward."""
        self.factor, self.now = 1.0, 0
        """What clipping multiplies gradients by, and the number of the step: both of the next update."""

    def hold(self, found: Mapping[str, Held]) -> None:
        """Take over weights in 8 bits: their gradients come to the stack from now on."""
        self.held = {each.anchor: each for each in found.values()}
        for each in self.held.values():
            each.sink = self.push

    def push(self, held: Held, grad_RC: Tensor) -> None:
        """Put a gradient on the stack. That of another use, or of another micro-batch, is added to the one that is there."""
        for at, (other, codes, scale) in enumerate(self.stack):
            if other is held:
                self.stack[at] = (held, *to_int8(grad_RC + from_int8(codes, scale)))
                return
        self.stack.append((held, *to_int8(grad_RC)))

    def norms(self) -> dict[nn.Parameter, Tensor]:
        """The norm of each gradient that is there, by parameter."""
        found = {held.anchor: from_int8(codes, scale).norm() for held, codes, scale in self.stack}
        return found | {each: each.grad.norm().float() for each in self.numbers if each.grad is not None}

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drop all gradients."""
        self.stack.clear()
        super().zero_grad(set_to_none)

    @contextmanager
    def sinking(self, note: Callable[[nn.Parameter, Tensor], None] | None) -> Iterator[None]:
        """Update each weight as soon as its gradient comes, in a block of code; without a `note`, which sees it first, drop it instead.

        Gradients of a weight that several modules share still come to the stack, since it changes when all of them are there.
        """
        groups = self._groups()

        def sink(held: Held, grad_RC: Tensor) -> None:
            if note is None:
                return
            note(held.anchor, grad_RC)
            if held.weight.uses > 1:
                self.push(held, grad_RC)
            else:
                self.update(groups[held.anchor], held, from_int8(*to_int8(grad_RC)))

        for each in self.held.values():
            each.sink = sink
        try:
            yield
        finally:
            for each in self.held.values():
                each.sink = self.push

    def plain_alone(self, parameter: nn.Parameter) -> None:
        """Update one parameter in floating point, whose gradient is there."""
        assert parameter.grad is not None
        self.update_plain(self._groups()[parameter], parameter, parameter.grad)

    def _groups(self) -> dict[nn.Parameter, dict[str, Any]]:
        return {each: group for group in self.param_groups for each in group["params"]}

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Update all weights that have a gradient, and free the gradients."""
        assert closure is None
        groups = self._groups()
        while self.stack:
            held, codes, scale = self.stack.pop()
            self.update(groups[held.anchor], held, from_int8(codes, scale))
        for parameter, group in groups.items():
            if parameter.grad is not None:
                self.update_plain(group, parameter, parameter.grad)
                parameter.grad = None
        return None

    @torch.no_grad()
    def update(self, group: Mapping[str, Any], held: Held, grad_RC: Tensor) -> None:
        """Update one weight in 8 bits."""
        state = self.state[held.anchor]
        if not state:
            state["momentum"], state["scale"] = to_int8(torch.zeros_like(grad_RC))
        weight, momentum = held.weight.dequantised(), from_int8(state["momentum"], state["scale"])
        _lion(weight, momentum, grad_RC.mul_(self.factor), group)
        state["momentum"], state["scale"] = to_int8(momentum)
        held.weight.store(weight, self._random(held, _UPDATE))

    @torch.no_grad()
    def update_plain(self, group: Mapping[str, Any], parameter: nn.Parameter, grad: Tensor) -> None:
        """Update one parameter in floating point."""
        state = self.state[parameter]
        if not state:
            state["exp_avg"] = torch.zeros_like(parameter, dtype=torch.float32)
        weight = parameter.float()
        _lion(weight, state["exp_avg"], grad.float() * self.factor, group)
        parameter.copy_(weight)

    def refresh(self) -> None:
        """Choose the outliers of every weight anew, once per epoch."""
        for held in self.held.values():
            held.weight.refresh(held.weight.dequantised(), self._random(held, _REFRESH))

    def _random(self, held: Held, what: int) -> torch.Generator:
        """The random numbers of one rounding: they depend on seed, step and weight alone."""
        key = np.random.SeedSequence((_DOMAIN, self.seed, self.now, self.numbers[held.anchor], what))
        device = held.weight.codes.device
        return torch.Generator(device).manual_seed(int(key.generate_state(1, np.uint64)[0] >> np.uint64(1)))


def _lion(weight: Tensor, momentum: Tensor, grad: Tensor, group: Mapping[str, Any]) -> None:
    """Lion's equation, in place."""
    (beta1, beta2), lr, decay = group["betas"], group["lr"], group["weight_decay"]
    update = torch.lerp(grad, momentum, beta1).sign_()
    weight.mul_(1 - lr * decay).add_(update, alpha=-lr)
    momentum.lerp_(grad, 1 - beta2)

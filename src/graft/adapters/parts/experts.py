"""Experts of one module: its parameters with a first dimension of M, of which one is used at a time, or the mean.

The module itself is built once. For a pass, `holding` puts the chosen tensors into the places of its parameters.

Legend: M experts.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Literal

import torch
from torch import Tensor, nn

from graft.adapters.base import Adapter


@contextmanager
def holding(module: nn.Module, tensors: Mapping[str, Tensor]) -> Iterator[None]:
    """Put these tensors, by dotted name, in the places of parameters of a module for a block of code."""
    kept: list[tuple[nn.Module, str, nn.Parameter | None]] = []
    try:
        for name, tensor in tensors.items():
            path, _, own = name.rpartition(".")
            owner = module.get_submodule(path)
            kept.append((owner, own, owner._parameters[own]))
            # `_parameters` is written directly, because setting the attribute refuses tensors that are not parameters.
            owner._parameters[own] = tensor  # pyright: ignore[reportArgumentType]
        yield
    finally:
        for owner, own, parameter in reversed(kept):
            owner._parameters[own] = parameter


class Experts:
    """M experts of an adapter module, which may have one half in common."""

    def __init__(self, of: Adapter, count: int, down: tuple[str, ...], share: Literal["up", "down", "none"]) -> None:
        self.of, self.count, self.share = of, count, share
        self.down = down
        """What the names of the parameters of the down half begin with; those of the up half are all others."""
        self.stacked: dict[str, int] = {}
        """The parameters with experts, each with the number of the draw that chooses among them."""

    def stack(self, others: Sequence[Adapter] = ()) -> None:
        """Give each parameter that is not shared and has none yet M experts: those of the M - 1 other modules, or copies of its own."""
        for name, parameter in list(self.of.named_parameters()):
            half = "down" if self.down and name.startswith(self.down) else "up"
            if name in self.stacked or half == self.share:
                continue
            own = parameter.detach()
            stack = (
                torch.stack([own, *(other.get_parameter(name).detach() for other in others)])
                if others
                else own.expand(self.count, *own.shape).clone(memory_format=torch.contiguous_format)
            )
            path, _, key = name.rpartition(".")
            self.of.get_submodule(path)._parameters[key] = nn.Parameter(stack, parameter.requires_grad)
            # Two halves with experts draw independently.
            self.stacked[name] = 1 if self.down and self.share == "none" and half == "up" else 0

    @property
    def draws(self) -> int:
        """How many draws choose an expert."""
        return max(self.stacked.values(), default=0) + 1

    def tensors(self) -> dict[str, Tensor]:
        """Return the parameters with experts, [M, ...] by name."""
        return {name: self.of.get_parameter(name) for name in self.stacked}

    def expert(self, numbers: Sequence[int | Tensor]) -> dict[str, Tensor]:
        """Return the parameters of one expert, by name. numbers: one for each draw; a tensor [1] in compiled code."""
        found = {}
        for name, draw in self.stacked.items():
            stack, number = self.of.get_parameter(name), numbers[draw]
            found[name] = stack.index_select(0, number)[0] if isinstance(number, Tensor) else stack[number]
        return found

    def mean(self) -> dict[str, Tensor]:
        """Return the mean of the experts, by name. It is computed at each call, since parameters may change."""
        # As a difference from the first one, so that the mean of equal experts is each of them, bit for bit.
        return {name: stack[0] + (stack - stack[0]).mean(0) for name, stack in self.tensors().items()}

    @contextmanager
    def averaged(self) -> Iterator[Adapter]:
        """Let the module be the mean of its experts for a block of code."""
        with holding(self.of, self.mean()):
            yield self.of

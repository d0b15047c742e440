"""Gradients of micro-batches added up in float32 beside parameters of a shorter format, in which small terms of a sum would be lost."""

from __future__ import annotations

from collections.abc import Collection

from torch import Tensor, nn


class Float32Sums:
    """Takes the gradients of parameters after each backward pass, and gives back their sums, each rounded once."""

    def __init__(self, parameters: Collection[nn.Parameter]) -> None:
        self.parameters = parameters
        self.sums: dict[int, Tensor] = {}

    def take(self) -> None:
        """Add the gradients that are there, and free them."""
        for parameter in self.parameters:
            if parameter.grad is None:
                continue
            if id(parameter) in self.sums:
                self.sums[id(parameter)] += parameter.grad
            else:
                self.sums[id(parameter)] = parameter.grad.float()
            parameter.grad = None

    def give(self) -> None:
        """Put the sums into the parameters."""
        for parameter in self.parameters:
            if (found := self.sums.pop(id(parameter), None)) is not None:
                parameter.grad = found.to(parameter.dtype)

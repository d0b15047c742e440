"""A matrix as a tensor train: W [I, O] is the row-major reshape of G_1 x ... x G_D, cores G_i [r_{i-1}, k_i, r_i], r_0 = r_D = 1.

Oseledets 2011; as LoRETTA uses it (Yang et al. 2024, arXiv 2402.11417). The product of the k_i is I * O; where one core ends and the next
begins need not be where inputs end and outputs begin.

Legend: I input width, O output width, D cores, k_i their sizes, r ranks.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from graft.architectures.site import SiteSpec

PUBLISHED: dict[frozenset[int], tuple[int, ...]] = {
    frozenset({768, 64}): (8, 8, 12, 8, 8), frozenset({1024, 64}): (4, 8, 8, 8, 8, 4), frozenset({4096, 64}): (16, 16, 16, 4, 4, 4),
    frozenset({5120, 64}): (5, 8, 8, 16, 8, 8), frozenset({8192, 64}): (4, 16, 16, 16, 8, 4),
    frozenset({768, 8}): (8, 8, 12, 8), frozenset({1024, 8}): (4, 8, 8, 8, 4), frozenset({2304, 8}): (8, 8, 8, 4, 9),
    frozenset({4096, 8}): (16, 16, 8, 4, 4), frozenset({5120, 8}): (8, 8, 10, 8, 8), frozenset({8192, 8}): (4, 16, 16, 16, 4),
    frozenset({768}): (8, 8, 12, 12, 8, 8), frozenset({1024}): (4, 8, 8, 16, 8, 8, 4), frozenset({4096}): (4, 4, 16, 16, 16, 16, 4, 4),
}  # fmt: skip
"""The sizes of LoRETTA's tables by the two widths."""


def core_sizes(width_in: int, width_out: int) -> tuple[int, ...]:
    """The published sizes for these widths, else derived: the prime factors of I * O, the two smallest joined up to 16."""
    if published := PUBLISHED.get(frozenset({width_in, width_out})):
        return published
    sizes = sorted(_primes(width_in) + _primes(width_out))
    while len(sizes) > 1 and sizes[0] * sizes[1] <= 16:
        sizes = sorted([sizes[0] * sizes[1], *sizes[2:]])
    return tuple(sizes)


def _primes(number: int) -> list[int]:
    found, divisor = [], 2
    while number > 1:
        while number % divisor == 0:
            found.append(divisor)
            number //= divisor
        divisor += 1
    return found


class Train(nn.Module):
    """x [..., I] -> x W [..., O], computed in the input's dtype."""

    shape: tuple[int, int]

    def cores_in_order(self) -> list[Tensor]:
        """G_1 to G_D."""
        raise NotImplementedError

    def weight(self) -> Tensor:
        """W [I, O], multiplied out from the left."""
        product, *rest = self.cores_in_order()
        product = product.flatten(0, 1)
        for core in rest:
            product = (product @ core.flatten(1)).reshape(-1, core.shape[2])
        return product.view(self.shape)

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight().to(x.dtype)


class TensorTrain(Train):
    """A train that trains. W's entries start with variance 1 / (I + O); the bias like nn.Linear's."""

    def __init__(self, spec: SiteSpec, width_in: int, width_out: int, rank: int, biases: bool) -> None:
        super().__init__()
        self.shape = (width_in, width_out)
        sizes = core_sizes(width_in, width_out)
        place_like = {"dtype": spec.dtype, "device": spec.device}
        ranks = [1, *[rank] * (len(sizes) - 1), 1]
        std = math.sqrt(1 / (width_in + width_out)) ** (1 / len(sizes))
        self.cores = nn.ParameterList(
            torch.randn(left, size, right, **place_like) * (std / math.sqrt(right))
            for left, size, right in zip(ranks, sizes, ranks[1:], strict=False)
        )
        bound = 1 / math.sqrt(width_out)
        self.bias = nn.Parameter(torch.empty(width_out, **place_like).uniform_(-bound, bound)) if biases else None

    def cores_in_order(self) -> list[Tensor]:
        return list(self.cores)

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        return y if self.bias is None else y + self.bias.to(y.dtype)


class FrozenTrain(Train):
    """A train as it was at one time, in buffers."""

    def __init__(self, train: TensorTrain) -> None:
        super().__init__()
        self.shape = train.shape
        for number, core in enumerate(train.cores):
            self.register_buffer(f"core{number}", core.detach().clone())

    def cores_in_order(self) -> list[Tensor]:
        return list(self.buffers())

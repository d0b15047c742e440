"""A matrix as a tensor train: W [I, O] is the row-major reshape of G_1 x ... x G_D, with cores G_i [r_{i-1}, k_i, r_i] and r_0 = r_D = 1.

The product of all k_i is I * O. A core may span the border between inputs and outputs.

Example: W [64, 32] has 2048 entries, and sizes (8, 16, 16) at rank 5 make cores [1, 8, 5], [5, 16, 5] and [5, 16, 1] with 520 entries.

Oseledets 2011, "Tensor-Train Decomposition"; used as in LoRETTA (Yang et al. 2024, arXiv 2402.11417).

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
"""The core sizes in LoRETTA's tables, by the two widths of the matrix (one if it is square)."""


def core_sizes(width_in: int, width_out: int) -> tuple[int, ...]:
    """Return the published core sizes for these widths, or derive them from the prime factors of I * O.

    The two smallest factors are joined as long as their product is at most 16.
    12 x 10: the primes 2 2 2 3 5 become 2 3 4 5, then 4 5 6, and stay, since 4 * 5 is more than 16.
    """
    if published := PUBLISHED.get(frozenset({width_in, width_out})):
        return published
    sizes = sorted(_primes(width_in) + _primes(width_out))
    while len(sizes) > 1 and sizes[0] * sizes[1] <= 16:
        sizes = sorted([sizes[0] * sizes[1], *sizes[2:]])
    return tuple(sizes)


def _primes(number: int) -> list[int]:
    """Return the prime factors of a number in ascending order."""
    found, divisor = [], 2
    while number > 1:
        while number % divisor == 0:
            found.append(divisor)
            number //= divisor
        divisor += 1
    return found


class Train(nn.Module):
    """Compute x W in the dtype of the input. x: [..., I] -> [..., O]."""

    shape: tuple[int, int]

    def cores_in_order(self) -> list[Tensor]:
        """Return G_1 to G_D."""
        raise NotImplementedError

    def weight(self) -> Tensor:
        """Multiply the cores out, from the left, to W [I, O]."""
        product, *rest = self.cores_in_order()
        product = product.flatten(0, 1)  # [k_1, r_1]
        for core in rest:
            product = (product @ core.flatten(1)).reshape(-1, core.shape[2])  # [k_1 ... k_i, r_i]
        return product.view(self.shape)

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight().to(x.dtype)


class TensorTrain(Train):
    """A train of parameters. The entries of W start with variance 1 / (I + O), the bias as in nn.Linear."""

    def __init__(self, spec: SiteSpec, width_in: int, width_out: int, rank: int, biases: bool) -> None:
        super().__init__()
        self.shape = (width_in, width_out)
        sizes = core_sizes(width_in, width_out)
        like = {"dtype": spec.dtype, "device": spec.device}
        ranks = [1, *[rank] * (len(sizes) - 1), 1]
        # An entry of W sums r_1 ... r_{D-1} products of D entries. Dividing by sqrt(r_i) cancels the sums, the D-th root the products.
        std = math.sqrt(1 / (width_in + width_out)) ** (1 / len(sizes))
        self.cores = nn.ParameterList(
            torch.randn(left, size, right, **like) * (std / math.sqrt(right))
            for left, size, right in zip(ranks, sizes, ranks[1:], strict=False)
        )
        bound = 1 / math.sqrt(width_out)
        self.bias = nn.Parameter(torch.empty(width_out, **like).uniform_(-bound, bound)) if biases else None

    def cores_in_order(self) -> list[Tensor]:
        return list(self.cores)

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        return y if self.bias is None else y + self.bias.to(y.dtype)


class FrozenTrain(Train):
    """A frozen copy of a train, held in buffers."""

    def __init__(self, train: TensorTrain) -> None:
        super().__init__()
        self.shape = train.shape
        for number, core in enumerate(train.cores):
            self.register_buffer(f"core{number}", core.detach().clone())

    def cores_in_order(self) -> list[Tensor]:
        return list(self.buffers())

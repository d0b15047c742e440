"""LoKr: an update that is the Kronecker product of a small matrix and a low-rank one.

    h' = h + s (W1 (x) W2) dropout(x),    s = alpha / rank,    W1 [O1, I1], W2 [O2, I2],    O = O1 O2, I = I1 I2

W2 is a product of rank R where that is smaller than the whole matrix, and so is W1 with `decompose_both`. The Kronecker product is never
written out: x, seen as a matrix [I1, I2], is multiplied by W2 from the right and by W1 from the left.

Example: I = O = 768 gives I1 = O1 = 24 and I2 = O2 = 32. W1 is [24, 24]. W2 is [32, 8] times [8, 32] at rank 8, and a whole [32, 32] from
rank 16 on.

Yeh et al. 2023, "LyCORIS" (arXiv 2309.14859). Sizes and initial values are PEFT's.

Legend: I input features, O output features, R rank; I1 I2 and O1 O2 are the factors of I and O.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from graft.adapters.parts.weight_delta import LowRank, WeightDelta
from graft.architectures.site import SiteSpec


class LoKr(LowRank):
    """Update that is the Kronecker product of a small matrix and a low-rank one."""

    source = "arXiv 2309.14859"
    suits = "Few parameters, and yet the update can have full rank."

    kind: Literal["lokr"] = "lokr"
    decompose_both: bool = False
    """Make the small matrix a low-rank product too, if its longer side is more than twice the rank."""
    factor: int | None = Field(default=None, ge=1)
    """First factor of each size: this number if it divides the size, otherwise the largest divisor below it, up to the square root. None:
    the largest divisor up to the square root."""

    def build(self, spec: SiteSpec) -> LoKrAdapter:
        return LoKrAdapter(self, spec)


def factors(size: int, wanted: int | None = None) -> tuple[int, int]:
    """Split `size` into two factors: `wanted` and the rest if that divides, otherwise the largest divisor up to the root and `wanted`.

    factors(768) is (24, 32), factors(768, 16) is (16, 48), factors(768, 20) is (16, 48).
    """
    if wanted is not None and size % wanted == 0:
        return wanted, size // wanted
    limit = math.isqrt(size) if wanted is None else min(math.isqrt(size), wanted)
    first = max(divisor for divisor in range(1, limit + 1) if size % divisor == 0)
    return first, size // first


class LoKrAdapter(WeightDelta):
    """w1 [O1, I1], or w1_a [O1, R] and w1_b [R, I1]; likewise w2. w1 (or w1_a) starts at zero, the others kaiming-uniform."""

    def __init__(self, config: LoKr, spec: SiteSpec) -> None:
        super().__init__(spec, config.dropout)
        self.scale, rank = config.scale, config.rank
        (O1, O2), (I1, I2) = (factors(size, config.factor) for size in (spec.out_features, spec.in_features))
        self.sizes = (I1, I2)
        whole1 = not (config.decompose_both and rank < max(O1, I1) / 2)
        self._add("w1", O1, I1, None if whole1 else rank, spec)
        self._add("w2", O2, I2, rank if rank < max(O2, I2) / 2 else None, spec)
        nn.init.zeros_(getattr(self, "w1" if whole1 else "w1_a"))

    def _add(self, name: str, num_out: int, num_in: int, rank: int | None, spec: SiteSpec) -> None:
        """Add W1 or W2 as one parameter, or as two of a low-rank product."""
        shapes = (
            {name: (num_out, num_in)} if rank is None else {f"{name}_a": (num_out, rank), f"{name}_b": (rank, num_in)}
        )
        for key, shape in shapes.items():
            parameter = nn.Parameter(torch.empty(shape, dtype=spec.dtype, device=spec.device))
            nn.init.kaiming_uniform_(parameter, a=math.sqrt(5))
            self.register_parameter(key, parameter)

    def _whole(self, name: str) -> Tensor:
        """Return W1 or W2, multiplied out if it is a low-rank product."""
        if name in self._parameters:
            return getattr(self, name)
        return getattr(self, f"{name}_a") @ getattr(self, f"{name}_b")

    def apply_to(self, x: Tensor) -> Tensor:
        w1, w2 = (self._whole("w1") * self.scale).to(x.dtype), self._whole("w2").to(x.dtype)  # [O1, I1], [O2, I2]
        half = F.linear(x.unflatten(-1, self.sizes), w2)  # [..., I1, O2]
        return F.linear(half.transpose(-1, -2), w1).transpose(-1, -2).flatten(-2)  # [..., O2, O1] -> [..., O]

    def difference(self) -> Tensor:
        return torch.kron(self._whole("w1") * self.scale, self._whole("w2"))  # [O, I]

"""LoHa: an update that is the elementwise product of two low-rank matrices.

    h' = h + s ((W1a W1b) (.) (W2a W2b)) dropout(x),        s = alpha / rank

The product of two matrices of rank R has rank R^2 at most. Its factors are, row by row, the Kronecker products of W1a with W2a and, column
by column, of W1b with W2b. While R^2 is less than both sizes of the layer, the update is applied through these factors, and no [O, I]
matrix is written out.

Example with R = 2: row o of `up` holds W1a[o, 0] W2a[o, 0], W1a[o, 0] W2a[o, 1], W1a[o, 1] W2a[o, 0] and W1a[o, 1] W2a[o, 1].

Hyeon-Woo et al. 2021, "FedPara" (arXiv 2108.06098); Yeh et al. 2023, "LyCORIS" (arXiv 2309.14859). The initial values are PEFT's.

Legend: I input features, O output features, R rank.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from graft.adapters.parts.weight_delta import LowRank, WeightDelta
from graft.architectures.site import SiteSpec


class LoHa(LowRank):
    """Update that is the elementwise product of two low-rank matrices."""

    source = "arXiv 2108.06098"
    suits = "An update of rank up to R * R with as many parameters as LoRA of rank 2 R."

    kind: Literal["loha"] = "loha"

    def build(self, spec: SiteSpec) -> LoHaAdapter:
        return LoHaAdapter(self, spec)


class LoHaAdapter(WeightDelta):
    """w1_a and w2_a [O, R], w1_b and w2_b [R, I]. All start kaiming-uniform, except w2_b, which starts at zero."""

    def __init__(self, config: LoHa, spec: SiteSpec) -> None:
        super().__init__(spec, config.dropout)
        like = {"dtype": spec.dtype, "device": spec.device}
        self.scale, rank = config.scale, config.rank
        self.w1_a = nn.Parameter(torch.empty(spec.out_features, rank, **like))
        self.w1_b = nn.Parameter(torch.empty(rank, spec.in_features, **like))
        self.w2_a = nn.Parameter(torch.empty(spec.out_features, rank, **like))
        self.w2_b = nn.Parameter(torch.zeros(rank, spec.in_features, **like))
        for tensor in (self.w1_a, self.w1_b, self.w2_a):
            nn.init.kaiming_uniform_(tensor, a=math.sqrt(5))
        self.factorised = rank**2 < min(spec.out_features, spec.in_features)

    def apply_to(self, x: Tensor) -> Tensor:
        if not self.factorised:
            return F.linear(x, self.difference().to(x.dtype))
        up = (self.w1_a[:, :, None] * self.w2_a[:, None, :]).flatten(1)  # [O, R^2]
        down = (self.w1_b[:, None, :] * self.w2_b[None, :, :]).flatten(0, 1)  # [R^2, I]
        return F.linear(F.linear(x, down.to(x.dtype)) * self.scale, up.to(x.dtype))  # [..., R^2] -> [..., O]

    def difference(self) -> Tensor:
        return self.scale * (self.w1_a @ self.w1_b) * (self.w2_a @ self.w2_b)  # [O, I]

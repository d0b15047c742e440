"""LoHa: a difference that is the elementwise product of two low-rank matrices, of a rank up to the square of theirs.

    h' = h + s ((W1a W1b) (.) (W2a W2b)) dropout(x),        s = alpha / rank

The product of two of rank R is one of rank R^2 (row by row a Kronecker product of W1a and W2a, likewise column by column), and is applied
as such while R^2 is less than the sizes of the layer, so that no [O, I] matrix is written out.

Hyeon-Woo et al. 2021, "FedPara" (arXiv 2108.06098); Yeh et al. 2023, "LyCORIS" (arXiv 2309.14859); start as in PEFT.

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
    """The elementwise product of two low-rank matrices as a difference."""

    source = "arXiv 2108.06098"
    suits = "A difference of rank up to R * R with the parameters of LoRA of rank 2 R."

    kind: Literal["loha"] = "loha"

    def build(self, spec: SiteSpec) -> LoHaAdapter:
        return LoHaAdapter(self, spec)


class LoHaAdapter(WeightDelta):
    """w1_a and w2_a [O, R], w1_b and w2_b [R, I], all kaiming-uniform but w2_b, which starts at zero."""

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
        self.small = rank**2 < min(spec.out_features, spec.in_features)

    def apply_to(self, x: Tensor) -> Tensor:
        if not self.small:
            return F.linear(x, self.difference().to(x.dtype))
        up = (self.w1_a[:, :, None] * self.w2_a[:, None, :]).flatten(1)  # [O, R^2]
        down = (self.w1_b[:, None, :] * self.w2_b[None, :, :]).flatten(0, 1)  # [R^2, I]
        return F.linear(F.linear(x, down.to(x.dtype)) * self.scale, up.to(x.dtype))

    def difference(self) -> Tensor:
        return self.scale * (self.w1_a @ self.w1_b) * (self.w2_a @ self.w2_b)

"""HiRA: the frozen weight times a low-rank matrix, element by element, as a difference of high rank.

    h' = h + s (W (.) B A) dropout(x),    s = alpha / rank

Huang et al. 2025, "HiRA: Parameter-Efficient Hadamard High-Rank Adaptation for Large Language Models" (ICLR 2025, openreview TwJrTz9cRS).
The paper and PEFT have no scale: alpha = rank, as at the defaults.

Legend: I input features, O output features, R rank.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from graft.adapters.parts.dense_delta import DenseDelta
from graft.adapters.parts.weight_delta import LowRank
from graft.architectures.site import SiteSpec


class HiRA(LowRank):
    """The elementwise product of the frozen weight and a low-rank matrix as a difference."""

    source = "openreview TwJrTz9cRS"
    suits = "A change of high rank for LoRA's number of parameters; makes a matrix of the weight's size in every pass until it is merged."

    kind: Literal["hira"] = "hira"
    rank: int = Field(default=8, ge=1)
    """Rank of the matrix that multiplies the frozen weight. PEFT's default is 32."""
    alpha: float = 8.0
    """Numerator of the scale; the difference is multiplied by alpha / rank."""

    def build(self, spec: SiteSpec) -> HiRAAdapter:
        return HiRAAdapter(self, spec)


class HiRAAdapter(DenseDelta):
    """A [R, I] starts kaiming-uniform, B [O, R] at zero."""

    reads_weight = True

    def __init__(self, config: HiRA, spec: SiteSpec) -> None:
        super().__init__(spec, config.dropout)
        like = {"dtype": spec.dtype, "device": spec.device}
        self.scale = config.scale
        self.A = nn.Parameter(torch.empty(config.rank, spec.in_features, **like))
        self.B = nn.Parameter(torch.zeros(spec.out_features, config.rank, **like))
        nn.init.kaiming_uniform_(self.A, a=math.sqrt(5))

    def difference(self) -> Tensor:
        return self.around.weight().to(self.A.dtype) * (self.scale * self.B @ self.A)

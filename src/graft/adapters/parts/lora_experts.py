"""LoRA on experts that one three-dimensional weight holds: W_e + s B_e A_e for each expert e.

Hu et al. 2021, "LoRA" (arXiv 2106.09685). PEFT stores the same as `target_parameters`: lora_A is [E R, I] with expert e in the rows e R to
(e + 1) R, and lora_B is [O, R E] with expert e in the columns e, E + e, 2 E + e, ...

Example with E = 2 and R = 3: rows 3 to 5 of lora_A and columns 1, 3, 5 of lora_B belong to expert 1.

Legend: E experts, R rank, I input features, O output features.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from graft.adapters.hooks import ExpertsAdapter
from graft.architectures.site import SiteSpec


class LoRAExperts(ExpertsAdapter):
    """A [E, R, I] starts kaiming-uniform, each expert by itself; B [E, O, R] starts at zero."""

    def __init__(self, rank: int, scale: float, lr_ratio: float, spec: SiteSpec) -> None:
        super().__init__(spec)
        like = {"dtype": spec.dtype, "device": spec.device}
        self.scale, self.lr_ratio = scale, lr_ratio
        self.A = nn.Parameter(torch.empty(spec.num_experts, rank, spec.in_features, **like))
        self.B = nn.Parameter(torch.zeros(spec.num_experts, spec.out_features, rank, **like))
        nn.init.kaiming_uniform_(
            self.A.view(-1, spec.in_features), a=math.sqrt(5)
        )  # a matrix [E R, I]: the fan-in is I

    def lr_factor(self, parameter: str) -> float:
        return 1.0 if parameter == "A" else self.lr_ratio

    def changed(self, weight: Tensor) -> Tensor:
        A, B = self.A.to(weight.dtype), self.B.to(weight.dtype)
        # W_e is stored as [O, I] or, by some families, transposed as [I, O]; then the update is A_e^T B_e^T.
        first, second = (A.transpose(1, 2), B.transpose(1, 2)) if self.transposed else (B, A)
        return torch.baddbmm(weight, first, second, alpha=self.scale)

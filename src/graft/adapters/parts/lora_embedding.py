"""LoRA on an embedding: h' = h + s B A[:, token], a low-rank update of the table.

The base's own forward looks the rows of A^T up, so an embedding that scales its output scales the update too. A head that shares the
embedding's weight keeps the base's weight. Hu et al. 2021, "LoRA" (arXiv 2106.09685).

Legend: V rows of the table, D width, R rank.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from graft.adapters.base import Adapter
from graft.adapters.surroundings import Surroundings
from graft.architectures.site import SiteSpec
from graft.ops.base_copy import embedding_copy
from graft.routing.context import AdapterContext


class LoRAEmbedding(Adapter):
    """A [R, V] starts at zero and B [D, R] from N(0, 1), as in PEFT. Each token reads its own column of A."""

    def __init__(self, rank: int, scale: float, spec: SiteSpec) -> None:
        super().__init__(spec)
        like = {"dtype": spec.dtype, "device": spec.device}
        self.scale = scale
        self.A = nn.Parameter(torch.zeros(rank, spec.in_features, **like))
        self.B = nn.Parameter(torch.randn(spec.out_features, rank, **like))

    def on_install(self, around: Surroundings) -> None:
        super().on_install(around)
        self._base_copy = (embedding_copy(around.host),)

    def adapt(self, x: Tensor, h: Tensor, ctx: AdapterContext) -> Tensor:
        low_R = self._base_copy[0].run({"weight": self.A.t()}, x).to(h.dtype)  # token ids [...] -> [..., R]
        return h + F.linear(low_R * self.scale, self.B.to(h.dtype))

    def fold(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        return weight + self.scale * (self.B @ self.A).t().to(weight.dtype), bias

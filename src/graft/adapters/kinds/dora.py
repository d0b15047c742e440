"""DoRA: LoRA for the direction of each row of the weight, and a trained magnitude for its length.

    W' = g (W + s B A),    g = m / ||W + s B A||

The norm is taken row by row, and backward treats it as a constant. The layer computes h' = h + (g - 1) (W x + s B A x) + s B A x, without
writing W' out. Dropout acts on the x of both products, W x and B A x.

Liu et al. 2024, "DoRA" (arXiv 2402.09353), equation 5 and section 4.3.

Legend: I input features, O output features, R rank.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from graft.adapters.kinds.lora import LoRAAdapter, LoRAFields
from graft.adapters.surroundings import Surroundings
from graft.architectures.site import SiteSpec
from graft.routing.context import AdapterContext


class DoRA(LoRAFields):
    """LoRA for the direction of each weight row, and a trained magnitude for its length."""

    source = "arXiv 2402.09353"
    suits = "For when LoRA at a small rank falls short of full training. Every step computes the norms of each adapted weight."

    kind: Literal["dora"] = "dora"

    def build(self, spec: SiteSpec) -> DoRAAdapter:
        return DoRAAdapter(self, spec)


class DoRAAdapter(LoRAAdapter):
    """LoRA's A and B, and the magnitude m [O], which starts as the row norms of the frozen weight."""

    def __init__(self, config: DoRA, spec: SiteSpec) -> None:
        super().__init__(config, spec)
        self.magnitude = nn.Parameter(torch.ones(spec.out_features, dtype=spec.dtype, device=spec.device))

    def on_install(self, around: Surroundings) -> None:
        super().on_install(around)
        with torch.no_grad():
            self.magnitude.copy_(self._norm())

    @torch.no_grad()
    def _norm(self) -> Tensor:
        """Return the row norms ||W + s B A|| [O], in the precision of the masters.

        A row of zeros has no direction. Its norm becomes the smallest positive number, so that nothing is divided by zero.
        """
        weight = self.around.weight().to(self.A.dtype)
        norm = torch.addmm(weight, self.B, self.A, alpha=self.scale).norm(dim=1)
        return norm.clamp_min(torch.finfo(norm.dtype).tiny)

    def adapt(self, x: Tensor, h: Tensor, ctx: AdapterContext) -> Tensor:
        bias = self.around.bias()
        if self.training and self.p:
            x = ctx.dropout(x, self.p, self.site_index).to(h.dtype)
            frozen = self.around.product(x)  # W x [..., O]: h has not seen this dropout
        else:
            frozen = h if bias is None else h - bias.to(h.dtype)  # W x [..., O], as the base computed it
        update = self.apply_to(x.to(h.dtype))  # s B A x [..., O]
        gain = (self.magnitude / self._norm() - 1).to(h.dtype)  # g - 1 [O], exactly zero at the start
        h = h + gain * (frozen + update) + update
        return h if self.bias is None else h + self.bias.to(h.dtype)

    def fold(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        gain, own = (self.magnitude / self._norm()).to(weight.dtype), self.around.bias()
        if bias is not None and own is not None:
            # The base's bias stays as it is, but what earlier parts of a stack added to it passes through g.
            bias = own.to(bias.dtype) + gain * (bias - own.to(bias.dtype))
        weight, bias = super().fold(weight, bias)
        return gain[:, None] * weight, bias

"""A vector of factors s, and optionally of shifts, on the output or the input of a linear layer.

    output:  h' = s (.) (h + c)  or  h' = s (.) h + b        input:  x' = s (.) x + b,  h' = h + c

The shift of the output is added before the factors (c) or after them (b). (IA)3, the Hadamard adapter, BitFit and LLaMA-Adapter V2 are
special cases. All of them start as the identity: s = 1, b = c = 0.

Legend: I input features, O output features.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from graft.adapters.base import Adapter
from graft.adapters.surroundings import Surroundings
from graft.architectures.site import SiteSpec
from graft.errors import GraftError
from graft.routing.context import AdapterContext


class OutputScaling(Adapter):
    """scale [O] or None; bias [O], added before the factors ("inside") or after them ("outside"), or None."""

    reads = "nothing"

    def __init__(
        self, spec: SiteSpec, bias: Literal["none", "inside", "outside"] = "none", *, scaled: bool = True
    ) -> None:
        super().__init__(spec)
        like = {"dtype": spec.dtype, "device": spec.device}
        self.inside = bias == "inside"
        self.scale = nn.Parameter(torch.ones(spec.out_features, **like)) if scaled else None
        self.bias = nn.Parameter(torch.zeros(spec.out_features, **like)) if bias != "none" else None

    def adapt(self, x: Tensor, h: Tensor, ctx: AdapterContext) -> Tensor:
        bias = None if self.bias is None else self.bias.to(h.dtype)
        if bias is not None and self.inside:
            h = h + bias
        if self.scale is not None:
            h = h * self.scale.to(h.dtype)
        return h if bias is None or self.inside else h + bias

    def fold(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        # s (.) (W x + d + c) = (diag(s) W) x + s (.) (d + c), and b is added after the factors
        own = None if self.bias is None else self.bias.to(weight.dtype)
        if own is not None and self.inside:
            bias = own if bias is None else bias + own
        if self.scale is not None:
            scale_O = self.scale.to(weight.dtype)
            weight, bias = scale_O[:, None] * weight, None if bias is None else scale_O * bias
        if own is not None and not self.inside:
            bias = own if bias is None else bias + own
        return weight, bias


class InputScaling(Adapter):
    """scale [I] and, if asked for, shift [I] of the input and bias [O] of the output."""

    reads = "nothing"

    def __init__(self, spec: SiteSpec, *, shift: bool = False, bias: bool = False) -> None:
        super().__init__(spec)
        like = {"dtype": spec.dtype, "device": spec.device}
        self.spec = spec
        self.scale = nn.Parameter(torch.ones(spec.in_features, **like))
        self.shift = nn.Parameter(torch.zeros(spec.in_features, **like)) if shift else None
        self.bias = nn.Parameter(torch.zeros(spec.out_features, **like)) if bias else None

    def on_install(self, around: Surroundings) -> None:
        super().on_install(around)
        if around.features is not None:
            raise GraftError(
                f"'{self.spec.name}' is a slice of the fused projection '{self.spec.module}', which has one input for q, k and v: "
                "scale the output of the slice, or name attn.qkv"
            )

    def before(self, x: Tensor, ctx: AdapterContext) -> Tensor:
        x = x * self.scale.to(x.dtype)
        return x if self.shift is None else x + self.shift.to(x.dtype)

    def adapt(self, x: Tensor, h: Tensor, ctx: AdapterContext) -> Tensor:
        return h if self.bias is None else h + self.bias.to(h.dtype)

    def fold(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        if self.bias is None:
            return weight, bias
        own = self.bias.to(weight.dtype)
        return weight, own if bias is None else bias + own

    def fold_input(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        if self.shift is not None:
            shifted = weight @ self.shift.to(weight.dtype)
            bias = shifted if bias is None else bias + shifted
        return weight * self.scale.to(weight.dtype), bias

"""Full training of a linear layer, kept as a difference: h + D x (+ d), so that the base stays as it is.

What PEFT calls modules_to_save and LLM-Adapters stores as whole replaced weights is this difference to the base.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from graft.adapters.base import Adapter, AdapterConfig, Place
from graft.passes import Context


class Full(AdapterConfig):
    """Every weight of the named linear layers, as a difference to the base."""

    kind: Literal["full"] = "full"
    train_bias: bool = False
    """Also learn a difference to the layer's bias."""
    sites: str | tuple[str, ...] = "head"

    @property
    def folds(self) -> bool:
        return True

    def build(self, place: Place) -> FullAdapter:
        return FullAdapter(self, place)


class FullAdapter(Adapter):
    """weight [O, I] and, where asked for, bias [O]; both start at zero."""

    def __init__(self, config: Full, place: Place) -> None:
        super().__init__(place)
        like = {"dtype": place.dtype, "device": place.device}
        self.weight = nn.Parameter(torch.zeros(place.out_features, place.in_features, **like))
        self.bias = nn.Parameter(torch.zeros(place.out_features, **like)) if config.train_bias else None

    def adapt(self, x: Tensor, h: Tensor, ctx: Context) -> Tensor:
        bias = None if self.bias is None else self.bias.to(h.dtype)
        return h + F.linear(x.to(h.dtype), self.weight.to(h.dtype), bias)

    def fold(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        weight = weight + self.weight.to(weight.dtype)
        if self.bias is not None:
            bias = self.bias.to(weight.dtype) if bias is None else bias + self.bias.to(bias.dtype)
        return weight, bias

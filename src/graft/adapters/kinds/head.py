"""A layer of the adapter's own in place of the base's: h' = W x + b, for a head that the base does not have.

transformers draws a classifier's missing head at random each time it loads a base, so a difference from that head would mean nothing in
another process. The adapter therefore holds W and b whole. They start as what the base has when the adapter is attached.

Legend: I input features, O output features.
"""

from __future__ import annotations

from typing import ClassVar, Literal

from torch import Tensor, nn
from torch.nn import functional as F

from graft.adapters.base import Adapter, AdapterConfig
from graft.adapters.surroundings import Surroundings
from graft.architectures.site import SiteSpec
from graft.routing.context import AdapterContext


class Head(AdapterConfig):
    """Linear layers of the adapter's own in place of the base's, stored whole."""

    replaces: ClassVar[bool] = True
    suits = "A classifier's head on a base that has none. Runs add it automatically."

    kind: Literal["head"] = "head"
    sites: str | tuple[str, ...] = "head"

    @property
    def folds(self) -> bool:
        return True

    def build(self, spec: SiteSpec) -> HeadAdapter:
        return HeadAdapter(spec)


class HeadAdapter(Adapter):
    """weight [O, I] and, if the base's layer has one, bias [O]."""

    def __init__(self, spec: SiteSpec) -> None:
        super().__init__(spec)
        self.spec = spec

    def on_install(self, around: Surroundings) -> None:
        super().on_install(around)
        like = {"dtype": self.spec.dtype, "device": self.spec.device}
        bias = around.bias()
        self.weight = nn.Parameter(around.weight().detach().to(**like, copy=True))
        self.bias = None if bias is None else nn.Parameter(bias.detach().to(**like, copy=True))

    def adapt(self, x: Tensor, h: Tensor, ctx: AdapterContext) -> Tensor:
        bias = None if self.bias is None else self.bias.to(h.dtype)
        return F.linear(x.to(h.dtype), self.weight.to(h.dtype), bias)

    def fold(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        return self.weight.to(weight.dtype), None if self.bias is None else self.bias.to(weight.dtype)

"""Kinds that each break one promise of the contract, as a stranger might."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from graft.adapters.base import Adapter, AdapterConfig
from graft.architectures.site import SiteSpec
from graft.routing.context import AdapterContext


class ScaleAdapter(Adapter):
    """h * w, as it should be; the kinds below change one thing each."""

    def __init__(self, spec: SiteSpec) -> None:
        super().__init__(spec)
        self.w = nn.Parameter(torch.ones(spec.out_features, dtype=spec.dtype, device=spec.device))

    def adapt(self, x: Tensor, h: Tensor, ctx: AdapterContext) -> Tensor:
        return h * self.w.to(h.dtype)


class Broken(AdapterConfig):
    sites: str | tuple[str, ...] = "attn.v mlp.down"


class StartsElsewhere(Broken):
    kind: Literal["starts-elsewhere"] = "starts-elsewhere"

    def build(self, spec: SiteSpec) -> Adapter:
        adapter = ScaleAdapter(spec)
        nn.init.constant_(adapter.w, 1.1)
        return adapter


class ChangesBaseAdapter(ScaleAdapter):
    def adapt(self, x: Tensor, h: Tensor, ctx: AdapterContext) -> Tensor:
        if self.training:
            self.around.weight().data.mul_(1.001)
        return super().adapt(x, h, ctx)


class ChangesBase(Broken):
    kind: Literal["changes-base"] = "changes-base"

    def build(self, spec: SiteSpec) -> Adapter:
        return ChangesBaseAdapter(spec)


class NeverTrainsAdapter(ScaleAdapter):
    def __init__(self, spec: SiteSpec) -> None:
        super().__init__(spec)
        self.b = nn.Parameter(torch.zeros_like(self.w))

    def adapt(self, x: Tensor, h: Tensor, ctx: AdapterContext) -> Tensor:
        return super().adapt(x, h, ctx) + self.b.detach().to(h.dtype)


class NeverTrains(Broken):
    kind: Literal["never-trains"] = "never-trains"

    def build(self, spec: SiteSpec) -> Adapter:
        return NeverTrainsAdapter(spec)


class UnsavedBufferAdapter(ScaleAdapter):
    def __init__(self, spec: SiteSpec) -> None:
        super().__init__(spec)
        self.register_buffer("directions", torch.randn_like(self.w), persistent=False)

    def adapt(self, x: Tensor, h: Tensor, ctx: AdapterContext) -> Tensor:
        return h + ((self.w - 1) * self.directions).to(h.dtype)


class UnsavedBuffer(Broken):
    kind: Literal["unsaved-buffer"] = "unsaved-buffer"

    def build(self, spec: SiteSpec) -> Adapter:
        return UnsavedBufferAdapter(spec)


class WrongFoldAdapter(ScaleAdapter):
    def fold(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        return weight + self.w[:, None].to(weight.dtype), bias


class WrongFold(Broken):
    kind: Literal["wrong-fold"] = "wrong-fold"

    @property
    def folds(self) -> bool:
        return True

    def build(self, spec: SiteSpec) -> Adapter:
        return WrongFoldAdapter(spec)


class NoFold(Broken):
    kind: Literal["no-fold"] = "no-fold"

    @property
    def folds(self) -> bool:
        return True

    def build(self, spec: SiteSpec) -> Adapter:
        return ScaleAdapter(spec)


class MixesRowsAdapter(ScaleAdapter):
    def adapt(self, x: Tensor, h: Tensor, ctx: AdapterContext) -> Tensor:
        return h + (h - h.mean(0, keepdim=True)) * (self.w - 1).to(h.dtype)


class MixesRows(Broken):
    kind: Literal["mixes-rows"] = "mixes-rows"

    def build(self, spec: SiteSpec) -> Adapter:
        return MixesRowsAdapter(spec)


class UnseededDropoutAdapter(ScaleAdapter):
    def __init__(self, spec: SiteSpec) -> None:
        super().__init__(spec)
        self.drop = nn.Dropout(0.3)

    def adapt(self, x: Tensor, h: Tensor, ctx: AdapterContext) -> Tensor:
        return h + self.drop(h) * (self.w - 1).to(h.dtype)


class UnseededDropout(Broken):
    kind: Literal["unseeded-dropout"] = "unseeded-dropout"

    def build(self, spec: SiteSpec) -> Adapter:
        return UnseededDropoutAdapter(spec)


class LeavesStateAdapter(ScaleAdapter):
    def adapt(self, x: Tensor, h: Tensor, ctx: AdapterContext) -> Tensor:
        self.last = super().adapt(x, h, ctx)
        return self.last


class LeavesState(Broken):
    kind: Literal["leaves-state"] = "leaves-state"

    def build(self, spec: SiteSpec) -> Adapter:
        return LeavesStateAdapter(spec)


class DependsOnThePastAdapter(ScaleAdapter):
    def __init__(self, spec: SiteSpec) -> None:
        super().__init__(spec)
        self.register_buffer("mean", torch.zeros_like(self.w) + 0.1)

    def adapt(self, x: Tensor, h: Tensor, ctx: AdapterContext) -> Tensor:
        self.mean.lerp_(h.detach().float().flatten(0, -2).mean(0).to(self.mean.dtype), 0.1)
        return h + ((self.w - 1) * self.mean).to(h.dtype)


class DependsOnThePast(Broken):
    kind: Literal["depends-on-the-past"] = "depends-on-the-past"

    def build(self, spec: SiteSpec) -> Adapter:
        return DependsOnThePastAdapter(spec)


class RoughMasters(Broken):
    kind: Literal["rough-masters"] = "rough-masters"

    def build(self, spec: SiteSpec) -> Adapter:
        return ScaleAdapter(spec).to(torch.bfloat16)


class PromotesAdapter(ScaleAdapter):
    def adapt(self, x: Tensor, h: Tensor, ctx: AdapterContext) -> Tensor:
        return h * self.w


class Promotes(Broken):
    kind: Literal["promotes"] = "promotes"

    def build(self, spec: SiteSpec) -> Adapter:
        return PromotesAdapter(spec)


class AnotherDeviceAdapter(ScaleAdapter):
    def __init__(self, spec: SiteSpec) -> None:
        super().__init__(spec)
        self.w = nn.Parameter(torch.ones(spec.out_features, dtype=spec.dtype))


class AnotherDevice(Broken):
    kind: Literal["another-device"] = "another-device"

    def build(self, spec: SiteSpec) -> Adapter:
        return AnotherDeviceAdapter(spec)


class ReadsANumberAdapter(ScaleAdapter):
    def adapt(self, x: Tensor, h: Tensor, ctx: AdapterContext) -> Tensor:
        return h if float(self.w.sum()) == 0 else super().adapt(x, h, ctx)


class ReadsANumber(Broken):
    kind: Literal["reads-a-number"] = "reads-a-number"

    def build(self, spec: SiteSpec) -> Adapter:
        return ReadsANumberAdapter(spec)


class NoSuchSite(Broken):
    kind: Literal["no-such-site"] = "no-such-site"
    sites: str | tuple[str, ...] = "attn.nothing"

    def build(self, spec: SiteSpec) -> Adapter:
        return ScaleAdapter(spec)


class RaisesAdapter(ScaleAdapter):
    def adapt(self, x: Tensor, h: Tensor, ctx: AdapterContext) -> Tensor:
        raise IndexError("nothing at place 3")


class Raises(Broken):
    kind: Literal["raises"] = "raises"

    def build(self, spec: SiteSpec) -> Adapter:
        return RaisesAdapter(spec)


class NotInTheFile(Broken):
    """Its name in the module is another one, so that a fresh process does not find it."""

    kind: Literal["not-in-the-file"] = "not-in-the-file"

    def build(self, spec: SiteSpec) -> Adapter:
        return ScaleAdapter(spec)


NotInTheFile.__qualname__ = "Elsewhere"

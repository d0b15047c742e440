"""Parallel adapters: a bottleneck beside a site, h' = h + f(x).

He et al. 2021, "Towards a Unified View of Parameter-Efficient Transfer Learning" (arXiv 2110.04366).
"""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from graft.adapters.base import Place
from graft.adapters.bottleneck import BottleneckAdapter, BottleneckConfig
from graft.passes import Context


class Parallel(BottleneckConfig):
    """A bottleneck adapter beside a sublayer or a linear layer."""

    source = "arXiv 2110.04366"

    kind: Literal["parallel"] = "parallel"
    sites: str | tuple[str, ...] = "mlp"

    def build(self, place: Place) -> ParallelAdapter:
        return ParallelAdapter(self, place)


class ParallelAdapter(BottleneckAdapter):
    """The bottleneck leads from the site's input width to its output width."""

    def __init__(self, config: Parallel, place: Place) -> None:
        super().__init__(config, place, place.in_features, place.out_features)

    def adapt(self, x: Tensor, h: Tensor, ctx: Context) -> Tensor:
        return self.with_bias(h) + self.f(x, ctx).to(h.dtype)

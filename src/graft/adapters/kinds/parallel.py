"""Parallel adapters: a bottleneck f beside a site, h' = h + f(x), with x the site's input or the residual stream (AdapterHub).

He et al. 2021, "Towards a Unified View of Parameter-Efficient Transfer Learning" (arXiv 2110.04366).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Literal

from torch import Tensor

from graft.adapters.parts.bottleneck import BottleneckAdapter, DenseBottleneckConfig
from graft.architectures.site import SiteLike, SiteSpec, SiteType
from graft.errors import GraftError
from graft.routing.context import AdapterContext


class Parallel(DenseBottleneckConfig):
    """Bottleneck beside a sublayer or a linear layer."""

    source = "arXiv 2110.04366"
    suits = "Like series, but it reads the site's input. With a wide bottleneck at the MLP it is the strongest form in its paper."

    takes: ClassVar[frozenset[SiteType]] = frozenset({*DenseBottleneckConfig.takes, "stream"})

    kind: Literal["parallel"] = "parallel"
    reads: Literal["site", "stream"] = "site"
    """What the bottleneck reads. site: the site's input. stream: the residual stream before any norm (AdapterHub's par_bn; only at
    sublayers)."""
    sites: str | tuple[str, ...] = "mlp"

    def check_sites(self, sites: Sequence[SiteLike]) -> None:
        super().check_sites(sites)
        if self.reads == "stream" and any(site.type != "sublayer" for site in sites):
            names = ", ".join(dict.fromkeys(site.name for site in sites))
            raise GraftError(f"reads: stream works only at the sublayers attn and mlp; given {names}")

    def build(self, spec: SiteSpec) -> ParallelAdapter:
        return ParallelAdapter(self, spec)


class ParallelAdapter(BottleneckAdapter):
    """A bottleneck from the site's input width to its output width."""

    def __init__(self, config: Parallel, spec: SiteSpec) -> None:
        super().__init__(config, spec, spec.in_features, spec.out_features)
        self.reads = "residual" if config.reads == "stream" else "input"

    def adapt(self, x: Tensor, h: Tensor, ctx: AdapterContext) -> Tensor:
        return self.with_bias(h) + self.f(x, ctx).to(h.dtype)

"""Parallel adapters: a bottleneck beside a site, h' = h + f(x), where x is the site's input, or the residual stream (AdapterHub).

He et al. 2021, "Towards a Unified View of Parameter-Efficient Transfer Learning" (arXiv 2110.04366).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from torch import Tensor

from graft.adapters.parts.bottleneck import BottleneckAdapter, DenseBottleneckConfig
from graft.architectures.site import SiteLike, SiteSpec
from graft.errors import GraftError
from graft.routing.context import AdapterContext


class Parallel(DenseBottleneckConfig):
    """A bottleneck adapter beside a sublayer or a linear layer."""

    source = "arXiv 2110.04366"
    suits = (
        "As series, but it reads what its site reads; with a wide bottleneck at the MLP the strong form of its paper."
    )

    kind: Literal["parallel"] = "parallel"
    reads: Literal["site", "stream"] = "site"
    """What f sees: the site's input, or the residual stream, not yet normed (AdapterHub's par_bn; at sublayers only)."""
    sites: str | tuple[str, ...] = "mlp"

    def check_sites(self, sites: Sequence[SiteLike]) -> None:
        super().check_sites(sites)
        if self.reads == "stream" and any(site.type != "sublayer" for site in sites):
            names = ", ".join(dict.fromkeys(site.name for site in sites))
            raise GraftError(f"reads: stream is for the sublayers attn and mlp; given {names}")

    def build(self, spec: SiteSpec) -> ParallelAdapter:
        return ParallelAdapter(self, spec)


class ParallelAdapter(BottleneckAdapter):
    """The bottleneck leads from the site's input width to its output width."""

    def __init__(self, config: Parallel, spec: SiteSpec) -> None:
        super().__init__(config, spec, spec.in_features, spec.out_features)
        self.reads = "residual" if config.reads == "stream" else "input"

    def adapt(self, x: Tensor, h: Tensor, ctx: AdapterContext) -> Tensor:
        return self.with_bias(h) + self.f(x, ctx).to(h.dtype)

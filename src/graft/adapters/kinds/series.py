"""Series adapters: a bottleneck f in series with a site.

    after the site (Houlsby, AdapterP):                     h' = h + f(h)
    after the site, reading the stream (Pfeiffer):          h' = h + f(LN(h + r))
    before the site (AdapterH at the gate and up layers):   x' = x + f(x)

r is the residual stream that h is added to. LN is the norm that post-norm families such as BERT apply to h + r; other families have none
here.

Houlsby et al. 2019 (arXiv 1902.00751); Pfeiffer et al. 2020 (arXiv 2005.00247); placements of LLM-Adapters (arXiv 2304.01933).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from pydantic import Field
from torch import Tensor

from graft.adapters.parts.bottleneck import BottleneckAdapter, BottleneckConfig, DenseBottleneckConfig
from graft.adapters.parts.information import information
from graft.adapters.parts.redundancy import redundancy
from graft.adapters.surroundings import Surroundings, frozen
from graft.architectures.site import SiteLike, SiteSpec
from graft.errors import GraftError
from graft.ops.added_loss import at_the_end, with_loss
from graft.routing.context import AdapterContext


class SeriesConfig(BottleneckConfig):
    """Settings of a bottleneck in series: where it stands, what it reads and what it is added to."""

    position: Literal["after", "before"] = "after"
    """after: the bottleneck changes the site's output. before: it changes the site's input."""
    reads: Literal["site", "stream"] = "site"
    """What the bottleneck reads. site: the site's output (or input). stream: the residual stream with the output added, after the norm if
    the family has one there (Pfeiffer; only with position: after at sublayers)."""
    skip: Literal["site", "stream", "none"] = "site"
    """What the bottleneck is added to. site: the site's output (or input). stream: what the bottleneck read. none: nothing."""
    redundancy: float = Field(default=0.0, ge=0.0)
    """Weight, at each site, of a loss on how much of what the bottleneck adds repeats what it reads (MixPHM). The mean over sequences."""
    information: float = Field(default=0.0, ge=0.0)
    """Weight, at each site, of a loss on how little what the bottleneck adds to a token says about its sequence, among all sequences of a
    step (MixPHM). They then run together, whatever `train.token_budget` is."""

    @property
    def added_losses(self) -> tuple[str, ...]:
        return tuple(name for name in ("redundancy", "information") if getattr(self, name))

    @property
    def compares_rows(self) -> bool:
        return self.information > 0

    def build(self, spec: SiteSpec) -> SeriesAdapter:
        return SeriesAdapter(self, spec)

    def check_sites(self, sites: Sequence[SiteLike]) -> None:
        super().check_sites(sites)
        if self.reads == "stream" and (self.position == "before" or any(site.type != "sublayer" for site in sites)):
            names = ", ".join(dict.fromkeys(site.name for site in sites))
            raise GraftError(
                f"reads: stream works only with position: after at the sublayers attn and mlp; given position: {self.position} at {names}"
            )
        if self.skip == "stream" and self.reads == "site":
            raise GraftError("skip: stream needs reads: stream; without it, skip: site means the same")


class Series(SeriesConfig, DenseBottleneckConfig):
    """Bottleneck after or before a sublayer or a linear layer."""

    source = "arXiv 1902.00751"
    suits = (
        "Nonlinear, so it can learn what no change of weights can. It cannot be merged and stays in the forward pass."
    )

    kind: Literal["series"] = "series"
    sites: str | tuple[str, ...] = "mlp"

    @property
    def starts_as_identity(self) -> bool:
        return super().starts_as_identity and self.skip == "site"


class SeriesAdapter(BottleneckAdapter):
    """A bottleneck as wide as the site's output (after) or input (before)."""

    def __init__(self, config: SeriesConfig, spec: SiteSpec) -> None:
        width = spec.out_features if config.position == "after" else spec.in_features
        super().__init__(config, spec, width, width)
        self.position, self.skip = config.position, config.skip
        self.redundancy, self.information = config.redundancy, config.information
        self.reads_mask = bool(config.added_losses)
        self.reads = "residual" if config.reads == "stream" else "nothing"

    def on_install(self, around: Surroundings) -> None:
        super().on_install(around)
        if self.reads_mask and around.answers:
            raise GraftError(
                "redundancy and information are losses on real tokens, and which tokens of a decoder behind an encoder are real is not "
                "known: name sites of the encoder (re:encoder...), or leave them out"
            )

    @property
    def acts_before(self) -> bool:
        return self.position == "before"

    def before(self, x: Tensor, ctx: AdapterContext) -> Tensor:
        if self.position == "after":
            return x
        f = self._bottleneck(x, ctx)
        return f if self.skip == "none" else x + f

    def _bottleneck(self, u: Tensor, ctx: AdapterContext) -> Tensor:
        """Compute f(u), and add the losses on what it is."""
        f = self.f(u, ctx)  # [..., O]
        if self.training and self.redundancy:
            f = with_loss(f, self.redundancy * redundancy(ctx.tokens(u), ctx.tokens(f)), "redundancy", ctx)
        if self.training and self.information:
            weight, added = self.information, ctx.tokens(f)
            at_the_end(lambda ends_RD: weight * information(added, ends_RD), "information", ctx)
        return f

    def adapt(self, x: Tensor, h: Tensor, ctx: AdapterContext) -> Tensor:
        h = self.with_bias(h)
        if self.position == "before":
            return h
        u = self.output_read(x, h)
        f = self._bottleneck(u, ctx).to(h.dtype)  # [..., O]
        return f if self.skip == "none" else f + (u if self.skip == "stream" else h)

    def output_read(self, x: Tensor, h: Tensor) -> Tensor:
        if self.reads != "residual":
            return h
        stream, norm = h + x.to(h.dtype), self.around.norm  # x is the residual stream here
        if norm is None:
            return stream
        own = next(norm.parameters(), stream).dtype  # which may be of fewer bits than h
        return frozen(norm, stream.to(own)).to(stream.dtype)

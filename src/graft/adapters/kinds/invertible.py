"""Invertible adapters: a coupling after the embedding, and its inverse before the output head (MAD-X).

    after the embedding    y1 = x1 + F(x2),   y2 = x2 + G(y1)
    before the head        x2 = y2 - G(y1),   x1 = y1 - F(x2)

x1 and x2 are the halves of a token's embedding. F and G are bottlenecks that both places share. With `coupling: glow` they also scale:

    y1 = e(F_s(x2)) x1 + F_t(x2),   y2 = e(G_s(y1)) x2 + G_t(y1),   e(s) = exp(c 2/pi atan(s / c)),   c = 5

where F_s and F_t are the halves of F's output. e keeps scales between exp(-c) and exp(c), so that the inverse stays exact.

An encoder has no output head over the vocabulary, so it has the first place only; name its module of embeddings
(`sites: re:bert.embeddings`) to act after the norm that it holds, as AdapterHub does.

Pfeiffer et al. 2020, "MAD-X" (arXiv 2005.00052); the couplings are NICE: Dinh et al. 2014 (arXiv 1410.8516), and the affine one of Glow:
Kingma and Dhariwal 2018 (arXiv 1807.03039).

Legend: D width of an embedding.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from graft.adapters.base import Adapter, AdapterConfig, Shared
from graft.adapters.parts.bottleneck import Dense, activation_of
from graft.architectures.site import SiteLike, SiteSpec, SiteType
from graft.errors import GraftError
from graft.routing.context import AdapterContext


class Invertible(AdapterConfig):
    """Invertible coupling after the embedding, with its inverse before the output head."""

    takes: ClassVar[frozenset[SiteType]] = frozenset({"embedding", "linear", "other"})
    source = "arXiv 2005.00052"
    suits = "Adapts the vocabulary to another language or domain, beside adapters in the blocks. It cannot be merged."

    kind: Literal["invertible"] = "invertible"
    reduction: int = Field(default=2, ge=1)
    """How many times narrower than half an embedding the bottlenecks F and G are."""
    coupling: Literal["nice", "glow"] = "nice"
    """What F and G do to the other half. nice: they are added. glow: they scale it too."""
    activation: str = "relu"
    """Activation in F and G, by its transformers name."""
    sites: str | tuple[str, ...] = "embed head?"

    @property
    def starts_as_identity(self) -> bool:
        return False

    def check_sites(self, sites: Sequence[SiteLike]) -> None:
        if inside := [
            site.name for site in sites if site.type == "linear" and site.name.split(".")[0] in ("attn", "mlp", "cross")
        ]:
            raise GraftError(
                f"invertible acts after the embedding and before the output head (embed head), not at {inside[0]}"
            )

    def build_shared(self, specs: Sequence[SiteSpec]) -> Shared:
        widths = {_width(spec) for spec in specs}
        if len(widths) > 1 or min(widths) % 2:
            raise GraftError(
                f"invertible: the embedding and the head's input need one even width, but they have {', '.join(map(str, sorted(widths)))}"
            )
        return Coupling(self, specs[0], widths.pop())

    def build(self, spec: SiteSpec) -> Adapter:
        return Undoes(spec) if spec.type == "linear" else Couples(spec)


def _width(spec: SiteSpec) -> int:
    return spec.in_features if spec.type == "linear" else spec.out_features


CLAMP = 5.0
"""c: the largest logarithm of a scale."""


class Coupling(Shared):
    """F and G: D/2 -> D/2 (glow: D) over D/2/reduction features, with weights N(0, 0.02)."""

    def __init__(self, config: Invertible, spec: SiteSpec, width: int) -> None:
        super().__init__()
        like = {"dtype": spec.dtype, "device": spec.device}
        half = width // 2
        hidden, self.scales = max(1, half // config.reduction), config.coupling == "glow"
        out = width if self.scales else half
        self.F, self.G = (
            nn.Sequential(Dense(half, hidden, **like), activation_of(config.activation), Dense(hidden, out, **like))
            for _ in "FG"
        )
        for name, parameter in self.named_parameters():
            nn.init.zeros_(parameter) if name.endswith("bias") else nn.init.normal_(parameter, std=0.02)

    def forward(self, x: Tensor) -> Tensor:
        """Return y for x [..., D]."""
        x1, x2 = x.chunk(2, -1)
        y1 = self._moved(x1, self.F(x2))
        return torch.cat([y1, self._moved(x2, self.G(y1))], -1)

    def inverse(self, y: Tensor) -> Tensor:
        """Return x for y [..., D]."""
        y1, y2 = y.chunk(2, -1)
        x2 = self._moved_back(y2, self.G(y1))
        return torch.cat([self._moved_back(y1, self.F(x2)), x2], -1)

    def _moved(self, half: Tensor, by: Tensor) -> Tensor:
        """Return one half [..., D/2], changed by what the other one gave."""
        if not self.scales:
            return half + by
        s, t = by.chunk(2, -1)
        return half * _bounded(s).exp() + t

    def _moved_back(self, half: Tensor, by: Tensor) -> Tensor:
        if not self.scales:
            return half - by
        s, t = by.chunk(2, -1)
        return (half - t) * (-_bounded(s)).exp()


def _bounded(s: Tensor) -> Tensor:
    return CLAMP * 2 / math.pi * torch.atan(s / CLAMP)


class Couples(Adapter):
    """The coupling, after the embedding."""

    reads = "nothing"

    def adapt(self, x: Tensor, h: Tensor, ctx: AdapterContext) -> Tensor:
        return self._shared[0](h)


class Undoes(Adapter):
    """The inverse, before the output head."""

    reads = "nothing"

    def before(self, x: Tensor, ctx: AdapterContext) -> Tensor:
        return self._shared[0].inverse(x)  # pyright: ignore[reportCallIssue]

"""What LoRA and its relatives have in common: a rank and a scale, patterns of both by site, and a difference linear in the input.

    h' = h + D dropout(x)          folded: W + D

Legend: I input features, O output features.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from pydantic import Field
from torch import Tensor

from graft.adapters.base import Adapter, AdapterConfig
from graft.architectures.site import SiteLike, SiteSpec
from graft.errors import GraftError
from graft.routing.context import AdapterContext


class LowRank(AdapterConfig):
    """The fields of every kind that has a rank per site."""

    rank: int = Field(default=8, ge=1)
    """Rank of the difference."""
    alpha: float = 16.0
    """Numerator of the scale; the difference is multiplied by alpha / rank."""
    dropout: float = Field(default=0.0, ge=0.0, lt=1.0)
    """Dropout on the adapter's input."""
    rank_pattern: dict[str, int] = {}
    """Ranks that differ: site name (as `attn.q`) or regular expression over module names -> rank."""
    alpha_pattern: dict[str, float] = {}
    """Alphas that differ, by the same patterns."""
    sites: str | tuple[str, ...] = "linear"

    @property
    def folds(self) -> bool:
        return True

    @property
    def scale(self) -> float:
        """The factor of the difference."""
        return self.alpha / self.rank

    def check_sites(self, sites: Sequence[SiteLike]) -> None:
        for field in ("rank_pattern", "alpha_pattern"):
            for key in getattr(self, field):
                if not any(matches(key, site) for site in sites):
                    names = ", ".join(dict.fromkeys(site.name for site in sites))
                    raise GraftError(
                        f"{field}: '{key}' matches none of the adapter's sites ({names}; e.g. module {sites[0].module})"
                    )
        for key, rank in self.rank_pattern.items():
            if rank < 1:
                raise GraftError(f"rank_pattern gives '{key}' rank {rank}: a rank is at least 1")

    def for_site(self, spec: SiteSpec) -> AdapterConfig:
        rank = next((rank for key, rank in self.rank_pattern.items() if matches(key, spec)), self.rank)
        alpha = next((alpha for key, alpha in self.alpha_pattern.items() if matches(key, spec)), self.alpha)
        return self.model_copy(update={"rank": rank, "alpha": alpha})


def matches(pattern: str, site: SiteLike) -> bool:
    """A site's name, or a regular expression that fits the end of the module's name from a dot on (of experts: with the part behind it)."""
    parts = [site.module, f"{site.module}.{site.name.rpartition('.')[2]}"][: 2 if site.type == "experts" else 1]
    return pattern == site.name or any(re.search(rf"(^|\.)({pattern})$", path) for path in parts)


class WeightDelta(Adapter):
    """A difference D [O, I] beside a frozen linear layer. A kind says what D is, and how it is applied without being written out."""

    def __init__(self, spec: SiteSpec, dropout: float) -> None:
        super().__init__(spec)
        self.p = dropout

    def apply_to(self, x: Tensor) -> Tensor:
        """D x in x's precision. x: [..., I] -> [..., O]."""
        raise NotImplementedError

    def difference(self) -> Tensor:
        """D [O, I] in the masters' precision."""
        raise NotImplementedError

    def adapt(self, x: Tensor, h: Tensor, ctx: AdapterContext) -> Tensor:
        if self.training:
            x = ctx.dropout(x, self.p, self.site_index)
        return h + self.apply_to(x.to(h.dtype))

    def fold(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        return weight + self.difference().to(weight.dtype), bias

"""What LoRA and its relatives share: a rank and a scale, patterns that change both by site, and an update that is linear in the input.

    h' = h + D dropout(x)          folded: W + D

Legend: I input features, O output features.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pydantic import Field, field_validator
from torch import Tensor

from graft.adapters.base import Adapter, AdapterConfig
from graft.architectures.site import SiteLike, SiteSpec
from graft.errors import GraftError
from graft.routing.context import AdapterContext
from graft.utils.patterns import pattern


class LowRank(AdapterConfig):
    """The settings of every kind that has a rank per site."""

    rank: int = Field(default=8, ge=1)
    """Rank of the update."""
    alpha: float = 16.0
    """Numerator of the scale alpha / rank of the update."""
    dropout: float = Field(default=0.0, ge=0.0, lt=1.0)
    """Dropout on the adapter's input."""
    rank_pattern: dict[str, int] = {}
    """Ranks of single sites: a site name such as `attn.q`, or a regular expression over module names, and the rank there."""
    alpha_pattern: dict[str, float] = {}
    """Alphas of single sites, by the same patterns."""
    sites: str | tuple[str, ...] = "linear"

    @property
    def folds(self) -> bool:
        return True

    @property
    def scale(self) -> float:
        """The factor of the update."""
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

    @field_validator("rank_pattern", "alpha_pattern")
    @classmethod
    def _keys_are_patterns(cls, value: dict[str, Any]) -> dict[str, Any]:
        for key in value:
            pattern(rf"(^|\.)({key})$")
        return value

    def for_site(self, spec: SiteSpec) -> AdapterConfig:
        rank = next((rank for key, rank in self.rank_pattern.items() if matches(key, spec)), self.rank)
        alpha = next((alpha for key, alpha in self.alpha_pattern.items() if matches(key, spec)), self.alpha)
        return self.model_copy(update={"rank": rank, "alpha": alpha})


def matches(key: str, site: SiteLike) -> bool:
    """Whether a key of a pattern is the site's name, or a regular expression that matches the end of the module's path from a dot on.

    "attn.q" matches by name; "1.self_attn.q_proj" matches "model.layers.1.self_attn.q_proj" but not that of layer 11. A site of experts is
    also matched with its part after the path, as in "mlp.experts.down".
    """
    paths = [site.module]
    if site.type == "experts":
        paths.append(f"{site.module}.{site.name.rpartition('.')[2]}")
    return key == site.name or any(pattern(rf"(^|\.)({key})$").search(path) for path in paths)


class WeightDelta(Adapter):
    """An update D [O, I] of the weight of a frozen linear layer. The kind defines D, and how to apply it without writing it out."""

    def __init__(self, spec: SiteSpec, dropout: float) -> None:
        super().__init__(spec)
        self.p = dropout

    def apply_to(self, x: Tensor) -> Tensor:
        """Compute D x in the dtype of x. x: [..., I] -> [..., O]."""
        raise NotImplementedError

    def difference(self) -> Tensor:
        """Return D [O, I] in the precision of the masters."""
        raise NotImplementedError

    def adapt(self, x: Tensor, h: Tensor, ctx: AdapterContext) -> Tensor:
        if self.training:
            x = ctx.dropout(x, self.p, self.site_index)
        return h + self.apply_to(x.to(h.dtype))

    def fold(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        return weight + self.difference().to(weight.dtype), bias

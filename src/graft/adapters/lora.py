"""LoRA: h + s * B(A(dropout(x))), a low-rank difference beside a frozen linear layer.

Hu et al. 2021, "LoRA" (arXiv 2106.09685); the scale alpha / sqrt(rank) is rsLoRA (Kalajdzievski 2023, arXiv 2312.03732).

Legend: I input features, O output features, R rank.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from graft.adapters.base import Adapter, AdapterConfig, Place, SiteLike
from graft.errors import GraftError
from graft.passes import Context


class LoRA(AdapterConfig):
    """Low-rank adaptation of linear layers: h + alpha / rank * B(A(x))."""

    source = "arXiv 2106.09685"

    kind: Literal["lora"] = "lora"
    rank: int = Field(default=8, ge=1)
    """Rank of the difference."""
    alpha: float = 16.0
    """Numerator of the scale; the difference is multiplied by alpha / rank."""
    dropout: float = Field(default=0.0, ge=0.0, lt=1.0)
    """Dropout on the input of A."""
    rslora: bool = False
    """Scale by alpha / sqrt(rank) instead of alpha / rank."""
    rank_pattern: dict[str, int] = {}
    """Ranks that differ: site name (as `attn.q`) or regular expression over module names -> rank."""
    alpha_pattern: dict[str, float] = {}
    """Alphas that differ, by the same patterns."""
    train_bias: bool = False
    """Also learn a difference to the layer's bias."""
    sites: str | tuple[str, ...] = "linear"

    @property
    def folds(self) -> bool:
        return True

    @property
    def scale(self) -> float:
        """The factor of the difference."""
        return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)

    def check_sites(self, sites: Sequence[SiteLike]) -> None:
        for field in ("rank_pattern", "alpha_pattern"):
            for key in getattr(self, field):
                if not any(_matches(key, site) for site in sites):
                    names = ", ".join(dict.fromkeys(site.name for site in sites))
                    raise GraftError(
                        f"{field}: '{key}' matches none of the adapter's sites ({names}; e.g. module {sites[0].module})"
                    )
        for key, rank in self.rank_pattern.items():
            if rank < 1:
                raise GraftError(f"rank_pattern gives '{key}' rank {rank}: a rank is at least 1")

    def for_site(self, place: Place) -> LoRA:
        rank = next((rank for key, rank in self.rank_pattern.items() if _matches(key, place)), self.rank)
        alpha = next((alpha for key, alpha in self.alpha_pattern.items() if _matches(key, place)), self.alpha)
        return self.model_copy(update={"rank": rank, "alpha": alpha})

    def build(self, place: Place) -> LoRAAdapter:
        return LoRAAdapter(self, place)


def _matches(pattern: str, site: SiteLike) -> bool:
    """A site's name, or a regular expression that fits the end of the module's name from a dot on."""
    return pattern == site.name or re.search(rf"(^|\.)({pattern})$", site.module) is not None


class LoRAAdapter(Adapter):
    """A [R, I] starts kaiming-uniform, B [O, R] at zero."""

    def __init__(self, config: LoRA, place: Place) -> None:
        super().__init__(place)
        like = {"dtype": place.dtype, "device": place.device}
        self.scale, self.p = config.scale, config.dropout
        self.A = nn.Parameter(torch.empty(config.rank, place.in_features, **like))
        self.B = nn.Parameter(torch.zeros(place.out_features, config.rank, **like))
        self.bias = nn.Parameter(torch.zeros(place.out_features, **like)) if config.train_bias else None
        nn.init.kaiming_uniform_(self.A, a=math.sqrt(5))

    def adapt(self, x: Tensor, h: Tensor, ctx: Context) -> Tensor:
        if self.training:
            x = ctx.dropout(x, self.p, self.site)
        x = x.to(h.dtype)
        low_R = F.linear(x, self.A.to(h.dtype))
        h = h + F.linear(low_R * self.scale, self.B.to(h.dtype))
        return h if self.bias is None else h + self.bias.to(h.dtype)

    def fold(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        weight = weight + self.scale * (self.B @ self.A).to(weight.dtype)
        if self.bias is not None:
            bias = self.bias.to(weight.dtype) if bias is None else bias + self.bias.to(bias.dtype)
        return weight, bias

"""A site: one place in one model where an adapter may sit."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal, Protocol

import torch
from torch import Tensor

SiteType = Literal["linear", "sublayer", "attention", "embedding", "norm", "experts", "other"]


@dataclass(frozen=True)
class SiteSpec:
    """What an adapter module is told of the site it is built for."""

    name: str
    """The site as the user writes it, e.g. "attn.q" or "mlp"."""
    type: SiteType
    module: str
    """Path of the module below the model's root."""
    in_features: int
    out_features: int
    layer: int | None
    index: int
    """Number of this site among the adapter's sites (keys seeded dropout)."""
    dtype: torch.dtype
    """Of the adapter's masters: float32, or float64 on a float64 base."""
    device: torch.device
    num_heads: int = 0
    num_kv_heads: int = 0
    head_dim: int = 0
    num_experts: int = 0


class SiteRequest(Protocol):
    """What the site language is asked by: an adapter's config."""

    @property
    def kind(self) -> str: ...

    @property
    def sites(self) -> str | tuple[str, ...]: ...

    takes: ClassVar[frozenset[SiteType]]


class SiteLike(Protocol):
    """What patterns match against: a resolved site or a place."""

    @property
    def name(self) -> str: ...

    @property
    def module(self) -> str: ...

    @property
    def type(self) -> SiteType: ...


@dataclass(frozen=True, eq=False)
class Site:
    """One place in one model. `module` holds the output h; `source` the input x where that lies in another module."""

    name: str
    type: SiteType
    module: str
    part: str
    in_features: int
    out_features: int
    layer: int | None = None
    source: str | None = None
    features: slice | Tensor | None = None
    """Rows of the module's output that this site is, for q, k, v of a fused projection."""
    residual: str | None = None
    """Of a sublayer: the module whose first input is the residual stream that h will be added to."""
    norm: str | None = None
    """Of a sublayer in a post-norm family: the norm that is applied to h + residual."""
    num_heads: int = 0
    num_kv_heads: int = 0
    head_dim: int = 0
    num_experts: int = 0

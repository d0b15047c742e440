"""A site: a place in a model where an adapter can act."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal, Protocol

import torch
from torch import Tensor

SiteType = Literal["linear", "sublayer", "attention", "embedding", "norm", "experts", "stream", "other"]


@dataclass(frozen=True)
class SiteSpec:
    """What an adapter module is told about the site that it is built for."""

    name: str
    """The site as the user writes it, e.g. "attn.q" or "mlp"."""
    type: SiteType
    module: str
    """The path of the module in the model."""
    in_features: int
    out_features: int
    layer: int | None
    index: int
    """The number of this site among the adapter's sites, a part of the key of seeded dropout."""
    dtype: torch.dtype
    """The dtype of the adapter's parameters: float32, or float64 on a float64 base."""
    device: torch.device
    num_heads: int = 0
    num_kv_heads: int = 0
    head_dim: int = 0
    num_experts: int = 0
    value_dim: int = 0
    """The size of a value, where it differs from that of a key, `head_dim` (multi-head latent attention)."""


class SiteRequest(Protocol):
    """What the site language needs of an adapter's config."""

    @property
    def kind(self) -> str: ...

    @property
    def sites(self) -> str | tuple[str, ...]: ...

    takes: ClassVar[frozenset[SiteType]]


class SiteLike(Protocol):
    """What patterns in a config are matched with: a `Site` or a `SiteSpec`."""

    @property
    def name(self) -> str: ...

    @property
    def module(self) -> str: ...

    @property
    def type(self) -> SiteType: ...


class SiteKeys:
    """Gives the modules of one adapter their keys in the containers of their hosts: `linear`, and `linear_1` for the second at one host."""

    def __init__(self) -> None:
        self._taken: dict[tuple[str, str], int] = {}

    def take(self, module: str, part: str) -> str:
        """Return the key of the next module of the adapter at this host and part."""
        count = self._taken[module, part] = self._taken.get((module, part), -1) + 1
        return f"{part}_{count}" if count else part


@dataclass(frozen=True, eq=False)
class Site:
    """A place in a model. `module` has the output h. `source` has the input x, if that is another module."""

    name: str
    type: SiteType
    module: str
    part: str
    in_features: int
    out_features: int
    layer: int | None = None
    source: str | None = None
    features: slice | Tensor | None = None
    """The output features of the module that are this site, for q, k or v of a fused projection; None for all."""
    residual: str | None = None
    """For a sublayer: the module with the residual stream, to which h is added, as its first input."""
    norm: str | None = None
    """For a sublayer of a post-norm family: the norm that acts on h + residual."""
    num_heads: int = 0
    num_kv_heads: int = 0
    head_dim: int = 0
    num_experts: int = 0
    value_dim: int = 0

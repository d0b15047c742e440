"""VeRA: two trained vectors per site around frozen random matrices that all sites share.

    h' = h + b (.) B (d (.) A dropout(x))

A and B have the size of the largest site, and every site takes a slice of them. So sites of different sizes go together, as with
grouped-query attention.

Kopiczko et al. 2023, "VeRA" (arXiv 2310.11454); the slices are PEFT's.

Legend: I input features, O output features, R rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from graft.adapters.base import AdapterConfig, Shared
from graft.adapters.parts.weight_delta import WeightDelta
from graft.architectures.site import SiteSpec


class VeRA(AdapterConfig):
    """Two trained vectors per site around random matrices that all sites share."""

    source = "arXiv 2310.11454"
    suits = "Many adapters on one base: each holds two vectors per site, and a seed reproduces the random matrices."

    kind: Literal["vera"] = "vera"
    rank: int = Field(default=256, ge=1)
    """Rank of the shared matrices."""
    dropout: float = Field(default=0.0, ge=0.0, lt=1.0)
    """Dropout on the input of A."""
    d_initial: float = 0.1
    """Initial value of the vector d between the matrices. b starts at zero."""
    seed: int = 0
    """Seed of the shared matrices. They do not depend on torch's global generator."""
    save_projection: bool = True
    """Save the shared matrices. Without them the file is smaller, but loads correctly only where torch draws the same numbers from the
    seed."""
    sites: str | tuple[str, ...] = "attn.q attn.v"

    @property
    def folds(self) -> bool:
        return True

    def build(self, spec: SiteSpec) -> VeRAAdapter:
        return VeRAAdapter(self, spec)

    def build_shared(self, specs: Sequence[SiteSpec]) -> Shared:
        return VeRAProjection(self, specs)


class VeRAProjection(Shared):
    """A [R, largest I] and B [largest O, R], kaiming-uniform, drawn on the CPU in this order so that every device gets the same."""

    A: Tensor
    B: Tensor

    def __init__(self, config: VeRA, specs: Sequence[SiteSpec]) -> None:
        super().__init__()
        max_in, max_out = (max(getattr(spec, size) for spec in specs) for size in ("in_features", "out_features"))
        generator = torch.Generator().manual_seed(config.seed)
        meta = specs[0].device.type == "meta"
        for name, shape in (("A", (config.rank, max_in)), ("B", (max_out, config.rank))):
            drawn = torch.empty(shape, device="meta" if meta else "cpu")
            if not meta:
                nn.init.kaiming_uniform_(drawn, generator=generator)
            drawn = drawn.to(specs[0].device, specs[0].dtype)
            self.register_buffer(name, drawn, persistent=config.save_projection)


class VeRAAdapter(WeightDelta):
    """The vectors d [R] and b [O] of one site."""

    def __init__(self, config: VeRA, spec: SiteSpec) -> None:
        super().__init__(spec, config.dropout)
        like = {"dtype": spec.dtype, "device": spec.device}
        self.in_features, self.out_features = spec.in_features, spec.out_features
        self.d = nn.Parameter(torch.full((config.rank,), config.d_initial, **like))
        self.b = nn.Parameter(torch.zeros(spec.out_features, **like))

    def _slices(self) -> tuple[Tensor, Tensor]:
        """Return this site's slices A [R, I] and B [O, R] of the shared matrices."""
        (shared,) = self._shared
        assert isinstance(shared, VeRAProjection)
        device = self.b.device
        return shared.A[:, : self.in_features].to(device), shared.B[: self.out_features].to(device)

    def apply_to(self, x: Tensor) -> Tensor:
        A, B = self._slices()
        low_R = F.linear(x, A.to(x.dtype)) * self.d.to(x.dtype)  # [..., R]
        return F.linear(low_R, B.to(x.dtype)) * self.b.to(x.dtype)  # [..., O]

    def difference(self) -> Tensor:
        A, B = self._slices()
        return self.b[:, None] * (B @ (self.d[:, None] * A))  # [O, I]

"""SHiRA: a difference that is zero but for a few entries at positions drawn once.

    h' = h + S dropout(x),    S [O, I] with K = rank (I + O) trained entries, as many as a LoRA of this rank has

Such a difference has a high rank although it is small. The positions are drawn from a seed and saved with the adapter.

Bhardwaj et al. 2024, "Sparse High Rank Adapters" (arXiv 2406.13175), its random mask.

Legend: I input features, O output features, K entries.
"""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from graft.adapters.base import AdapterConfig
from graft.adapters.filling import will_be_filled
from graft.adapters.parts.dense_delta import DenseDelta
from graft.architectures.site import SiteSpec
from graft.errors import GraftError


class SHiRA(AdapterConfig):
    """A sparse difference: a few entries of the weight at random positions."""

    source = "arXiv 2406.13175"
    suits = "Changes about 1% of the weights and leaves the others; makes a matrix of the weight's size in every pass until it is merged."

    kind: Literal["shira"] = "shira"
    rank: int = Field(default=8, ge=1)
    """Entries of a layer divided by its inputs plus outputs; no bound on the difference's rank. 8 as in LoRA; PEFT's default is 32."""
    dropout: float = Field(default=0.0, ge=0.0, lt=1.0)
    """Dropout on the adapter's input."""
    seed: int = Field(default=0, ge=0, lt=2**63)
    """Seed of the masks, whatever torch's own generator does."""
    mask_per: Literal["site", "shape"] = "site"
    """site: each site draws a mask of its own. shape: layers of one shape have the same mask, as in PEFT."""
    sites: str | tuple[str, ...] = "linear"

    @property
    def folds(self) -> bool:
        return True

    def build(self, spec: SiteSpec) -> SHiRAAdapter:
        return SHiRAAdapter(self, spec)


class SHiRAAdapter(DenseDelta):
    """values [K] start at zero; positions [2, K] are their rows and columns."""

    positions: Tensor

    def __init__(self, config: SHiRA, spec: SiteSpec) -> None:
        super().__init__(spec, config.dropout)
        self.shape = (spec.out_features, spec.in_features)
        count = config.rank * sum(self.shape)
        if count > spec.out_features * spec.in_features:
            raise GraftError(
                f"rank: {config.rank} asks for {count} entries, and '{spec.module}' has {spec.out_features} x {spec.in_features}"
            )
        seed = config.seed + (spec.index if config.mask_per == "site" else 0)
        self.register_buffer("positions", self._drawn(count, seed, spec.device))
        self.values = nn.Parameter(torch.zeros(count, dtype=spec.dtype, device=spec.device))

    def _drawn(self, count: int, seed: int, device: torch.device) -> Tensor:
        """Positions without repetition, drawn on the CPU, in the order of rows."""
        if will_be_filled() or device.type == "meta":
            return torch.zeros(2, count, dtype=torch.int32, device=device)
        order = torch.randperm(self.shape[0] * self.shape[1], generator=torch.Generator().manual_seed(seed))
        chosen = order[:count].sort().values
        return torch.stack([chosen // self.shape[1], chosen % self.shape[1]]).to(device, torch.int32)

    def check_filled(self) -> None:
        """Positions that lie in the weight, none of them twice."""
        sizes = torch.tensor(self.shape, device=self.positions.device)[:, None]
        if ((self.positions < 0) | (self.positions >= sizes)).any():
            raise GraftError(f"positions outside of a weight of {self.shape[0]} x {self.shape[1]}")
        rows_K, columns_K = self.positions.long()
        if len((rows_K * self.shape[1] + columns_K).unique()) < len(rows_K):
            raise GraftError("a position of the weight is there twice")

    def difference(self) -> Tensor:
        rows_K, columns_K = self.positions.long()
        return self.values.new_zeros(self.shape).index_put((rows_K, columns_K), self.values)

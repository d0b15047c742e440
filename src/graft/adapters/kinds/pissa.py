"""PiSSA: LoRA that starts from the principal singular vectors of the frozen weight, computed as the change since that start.

    W = U S V^T,  B0 = U_R sqrt(S_R / s),  A0 = sqrt(S_R / s) V_R^T,        h' = h + s (B A - B0 A0) x

The paper trains B A beside the residual W - s B0 A0, which changes the base. Here the base stays as it is and the function is the same. It
is computed as s ((B - B0) A + B0 (A - A0)) x, which is exactly zero at the start and later does not cancel large numbers. A saved adapter
holds A0 and B0, so that loading needs no decomposition and does not depend on what another SVD would return.

Dropout acts only on the x of B A, as it does beside a residual. Meng et al. 2024, "PiSSA" (arXiv 2404.02948).

Legend: I input features, O output features, R rank.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional as F

from graft.adapters.filling import will_be_filled
from graft.adapters.kinds.lora import LoRA, LoRAAdapter, LoRAFields
from graft.adapters.surroundings import Surroundings
from graft.architectures.site import SiteSpec
from graft.errors import GraftError
from graft.routing.context import AdapterContext


class PiSSA(LoRAFields):
    """LoRA that starts from the principal singular vectors of the weight and leaves the base as it is."""

    source = "arXiv 2404.02948"
    suits = "Trains the main directions of the weight from the first step. A file also holds the start, so it is twice the size of LoRA's."

    kind: Literal["pissa"] = "pissa"
    niter: int | None = Field(default=None, ge=0)
    """None: an exact SVD. A number: a randomised SVD with that many subspace iterations, fast on large weights (4, as in the paper, is
    close)."""

    def build(self, spec: SiteSpec) -> PiSSAAdapter:
        return PiSSAAdapter(self, spec)

    def to_lora(self) -> LoRA:
        """Return the config of the plain LoRA of twice the rank that computes the same. `PiSSAAdapter.to_lora` gives each site's tensors.

        The scale stays: twice alpha over twice the rank, or with rslora sqrt(2) alpha over sqrt(2 rank).
        """
        factor = math.sqrt(2) if self.rslora else 2.0
        shared = self.model_dump(exclude={"kind", "niter", "rank", "alpha", "rank_pattern", "alpha_pattern"})
        return LoRA(
            **shared,
            rank=2 * self.rank,
            alpha=factor * self.alpha,
            rank_pattern={key: 2 * rank for key, rank in self.rank_pattern.items()},
            alpha_pattern={key: factor * alpha for key, alpha in self.alpha_pattern.items()},
        )


def split(left: Tensor, values: Tensor, right: Tensor, rank: int, scale: float) -> tuple[Tensor, Tensor]:
    """Return A0 [R, I] and B0 [O, R] from a decomposition left [O, K], values [K], right [K, I] of a weight, with K at least R."""
    root = (values[:rank] / scale).sqrt()
    return root[:, None] * right[:rank], left[:, :rank] * root


class PiSSAAdapter(LoRAAdapter):
    """LoRA's A [R, I] and B [O, R], and their frozen start A0 and B0."""

    A0: Tensor
    B0: Tensor

    def __init__(self, config: PiSSA, spec: SiteSpec) -> None:
        super().__init__(config, spec)
        self.niter = config.niter
        self.register_buffer("A0", torch.zeros_like(self.A))
        self.register_buffer("B0", torch.zeros_like(self.B))

    def on_install(self, around: Surroundings) -> None:
        super().on_install(around)
        limit = min(self.B.shape[0], self.A.shape[1])
        if len(self.A) > limit:
            raise GraftError(
                f"rank {len(self.A)} is more than the {limit} singular directions of the weight: lower `rank`"
            )
        if not will_be_filled() and not self.A.is_meta:
            self._start(around.weight().to(self.A.dtype))

    @torch.no_grad()
    def _start(self, weight: Tensor) -> None:
        """Decompose the weight [O, I] and start from its first R singular vectors."""
        rank = len(self.A)
        if self.niter is None:
            left, values, right = torch.linalg.svd(weight, full_matrices=False)
        else:
            left, values, V = torch.svd_lowrank(weight, rank, niter=self.niter)
            right = V.T
        A0, B0 = split(left, values, right, rank, self.scale)
        self.A0.copy_(A0)
        self.B0.copy_(B0)
        self.A.copy_(self.A0)
        self.B.copy_(self.B0)

    def apply_to(self, x: Tensor) -> Tensor:
        # [B - B0, B0] [A; A - A0] = (B - B0) A + B0 (A - A0): one product of rank 2R
        down, up = torch.cat([self.A, self.A - self.A0]), torch.cat([self.B - self.B0, self.B0], 1)  # [2R, I], [O, 2R]
        return F.linear(F.linear(x, down.to(x.dtype)) * self.scale, up.to(x.dtype))

    def adapt(self, x: Tensor, h: Tensor, ctx: AdapterContext) -> Tensor:
        if self.training and self.p:
            kept = ctx.dropout(x, self.p, self.site_index)
            # s B0 A0 belongs to the frozen residual and reads x without dropout: `apply_to` subtracts it at `kept`, so correct by
            # s B0 A0 (kept - x).
            low_R = F.linear((kept - x).to(h.dtype), self.A0.to(h.dtype))  # [..., R]
            h, x = h + F.linear(low_R * self.scale, self.B0.to(h.dtype)), kept
        h = h + self.apply_to(x.to(h.dtype))
        return h if self.bias is None else h + self.bias.to(h.dtype)

    def difference(self) -> Tensor:
        return self.scale * ((self.B - self.B0) @ self.A + self.B0 @ (self.A - self.A0))

    def to_lora(self) -> dict[str, Tensor]:
        """Return A [2R, I] and B [O, 2R], and the bias if there is one, of a plain LoRA with the same scale."""
        found: dict[str, Tensor] = {"A": torch.cat([self.A, self.A0]), "B": torch.cat([self.B, -self.B0], 1)}
        if self.bias is not None:
            found["bias"] = self.bias
        return {key: tensor.detach() for key, tensor in found.items()}

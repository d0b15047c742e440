"""ReFT: an intervention in a low-rank subspace of the hidden states after a block, at the first and last positions or at all.

loreft:  h' = h + R^T (W h + b - R h), the rows of R [r, D] orthonormal
noreft:  h' = h + R^T (W h + b - R h), R free
direft:  h' = h + R^T (W h + b), R free

Wu et al. 2024, "ReFT" (arXiv 2404.03592). Stored is R itself [r, D], never a D x D matrix. Positions count real tokens, wherever the
padding lies; `suffix` counts from the end of what the model is given, which in generation is the prompt.

Legend: B rows, L length, S keys seen so far, T tokens of a flat batch, D hidden size, r rank.
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn import functional as F

from graft.adapters.base import Adapter, AdapterConfig
from graft.architectures.site import SiteSpec, SiteType
from graft.errors import GraftError
from graft.routing.context import AdapterContext


class ReFT(AdapterConfig):
    """A low-rank intervention in the hidden states after a block."""

    takes: ClassVar[frozenset[SiteType]] = frozenset({"sublayer"})
    source = "arXiv 2404.03592"
    suits = "A few positions of a few layers: very small, and cheap for long sequences."

    kind: Literal["reft"] = "reft"
    form: Literal["loreft", "noreft", "direft"] = "loreft"
    """Which equation."""
    rank: int = Field(default=4, ge=1)
    """Dimensions of the subspace."""
    positions: Literal["ends", "all"] = "ends"
    """Which tokens are changed: the first `prefix` and the last `suffix` of each sequence, or all."""
    prefix: int = Field(default=3, ge=0)
    """First tokens of each sequence that are changed."""
    suffix: int = Field(default=0, ge=0)
    """Last tokens of each sequence that are changed."""
    tied: bool = False
    """The same weights for prefix and suffix; else each has its own."""
    dropout: float = Field(default=0.0, ge=0.0, lt=1.0)
    """Dropout on the change within the subspace."""
    sites: str | tuple[str, ...] = "layer"

    @model_validator(mode="after")
    def _some_positions(self) -> ReFT:
        if self.positions == "ends" and not self.prefix + self.suffix:
            raise ValueError("prefix and suffix are both 0, so no token would be changed: give one, or positions: all")
        return self

    @property
    def starts_as_identity(self) -> bool:
        return False

    def build(self, spec: SiteSpec) -> ReFTAdapter:
        return ReFTAdapter(self, spec)


class Unit(nn.Module):
    """One intervention: R [r, D], W [r, D], b [r]."""

    def __init__(self, config: ReFT, spec: SiteSpec) -> None:
        super().__init__()
        place_like = {"dtype": spec.dtype, "device": spec.device}
        self.form = config.form
        start = torch.empty(config.rank, spec.out_features, **place_like)
        self.R = nn.Parameter(nn.init.orthogonal_(start) if spec.device.type != "meta" else start)
        self.W = nn.Linear(spec.out_features, config.rank, **place_like)

    def change(self, h: Tensor) -> tuple[Tensor, Tensor]:
        """(the change within the subspace [..., r], R [r, D]) in h's dtype."""
        R = (orthonormal_rows(self.R) if self.form == "loreft" else self.R).to(h.dtype)
        low = F.linear(h, self.W.weight.to(h.dtype), self.W.bias.to(h.dtype))
        return (low if self.form == "direft" else low - F.linear(h, R)), R


def orthonormal_rows(x: Tensor) -> Tensor:
    """The rows of x [r, D] made orthonormal, the first kept in its direction (Gram-Schmidt, by QR); orthonormal rows stay as they are."""
    Q, upper = torch.linalg.qr(x.t())
    return (Q * torch.sign(upper.diagonal())).t()


class ReFTAdapter(Adapter):
    """One unit for the prefix and one for the suffix, or one for both or all."""

    reads = "nothing"
    reads_mask = True

    def __init__(self, config: ReFT, spec: SiteSpec) -> None:
        super().__init__(spec)
        self.p = config.dropout
        if config.rank > spec.out_features:
            raise GraftError(
                f"reft: rank {config.rank} is more than the {spec.out_features} dimensions at '{spec.module}'"
            )
        both = config.positions == "ends" and config.prefix and config.suffix and not config.tied
        self.units = nn.ModuleList(Unit(config, spec) for _ in range(2 if both else 1))
        self.ends = None if config.positions == "all" else (config.prefix, config.suffix)

    def adapt(self, x: Tensor, h: Tensor, ctx: AdapterContext) -> Tensor:
        if self.ends is None:
            return h + self._changed(self.units[0], h, ctx)
        first, last = chosen_positions(h, ctx, *self.ends)
        if len(self.units) == 1:
            return torch.where((first | last)[..., None], h + self._changed(self.units[0], h, ctx), h)
        for unit, chosen in zip(self.units, (first, last), strict=True):
            h = torch.where(chosen[..., None], h + self._changed(unit, h, ctx), h)
        return h

    def _changed(self, unit: Any, h: Tensor, ctx: AdapterContext) -> Tensor:
        low, R = unit.change(h)
        if self.training:
            low = ctx.dropout(low, self.p, self.site_index)
        return low @ R


def chosen_positions(h: Tensor, ctx: AdapterContext, prefix: int, suffix: int) -> tuple[Tensor, Tensor]:
    """Which of h's tokens [B, L] (or [1, T]) are among the first `prefix` and the last `suffix` real ones of their sequences."""
    if torch.compiler.is_compiling():
        raise GraftError(
            "reft at the ends of sequences does not run compiled (a graph knows no padding): use positions: all"
        )
    length = h.shape[1]
    if ctx.flat:
        assert ctx.lengths is not None
        spec = torch.cat([torch.arange(n) for n in ctx.lengths]).to(h.device)[None]
        total = torch.cat([torch.full((n,), n) for n in ctx.lengths]).to(h.device)[None]
        return spec < prefix, spec >= total - suffix
    mask = ctx.mask
    if mask is None or mask.dim() != 2 or mask.shape[0] != h.shape[0] or mask.shape[1] < length:
        given = None if mask is None else tuple(mask.shape)
        raise GraftError(
            f"reft needs the attention mask [B, L] to find the ends of {h.shape[0]} sequences of length {length}; at hand is {given}. "
            "Call the model as a whole, or use positions: all"
        )
    mask = mask.to(h.device).long()
    spec, total = mask.cumsum(1) - 1, mask.sum(1, keepdim=True)
    real = mask.bool()[:, -length:]
    first = real & (spec[:, -length:] < prefix)
    last = real & (spec[:, -length:] >= total - suffix)
    return first, last if mask.shape[1] == length else torch.zeros_like(last)

"""ReFT: an intervention in a low-rank subspace of the hidden states after a block, at the first and last positions or at all positions.

    loreft:  h' = h + R^T (W h + b - R h), with orthonormal rows of R [r, D]
    noreft:  h' = h + R^T (W h + b - R h), with any R
    direft:  h' = h + R^T (W h + b), with any R

The file holds R itself [r, D], never a matrix [D, D]. Positions count real tokens, wherever the padding is. `suffix` counts from the end of
what the model is given, which in generation is the prompt.

Wu et al. 2024, "ReFT" (arXiv 2404.03592).

Legend: B rows, L length, S keys seen so far, T tokens of a packed batch, D hidden size, r rank.
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
    """Low-rank intervention on the hidden states after a block."""

    takes: ClassVar[frozenset[SiteType]] = frozenset({"sublayer"})
    source = "arXiv 2404.03592"
    suits = "Changes a few positions in a few layers: very small, and cheap on long sequences."

    kind: Literal["reft"] = "reft"
    form: Literal["loreft", "noreft", "direft"] = "loreft"
    """The equation. loreft: with orthonormal R. noreft: with any R. direft: with any R, and without subtracting R h."""
    rank: int = Field(default=4, ge=1)
    """Number of dimensions of the subspace."""
    positions: Literal["ends", "all"] = "ends"
    """Which tokens are changed. ends: the first `prefix` and the last `suffix` tokens of each sequence. all: every token."""
    prefix: int = Field(default=3, ge=0)
    """Number of tokens that are changed at the start of each sequence."""
    suffix: int = Field(default=0, ge=0)
    """Number of tokens that are changed at the end of each sequence."""
    tied: bool = False
    """Whether prefix and suffix share their weights. Otherwise each has its own."""
    dropout: float = Field(default=0.0, ge=0.0, lt=1.0)
    """Dropout on the change within the subspace."""
    sites: str | tuple[str, ...] = "layer"

    @model_validator(mode="after")
    def _some_positions(self) -> ReFT:
        if self.positions == "ends" and not self.prefix + self.suffix:
            raise ValueError(
                "prefix and suffix are both 0, so no token would be changed: give one of them, or positions: all"
            )
        return self

    @property
    def starts_as_identity(self) -> bool:
        return False

    def build(self, spec: SiteSpec) -> ReFTAdapter:
        return ReFTAdapter(self, spec)


class Intervention(nn.Module):
    """R [r, D], W [r, D] and b [r] of one intervention."""

    def __init__(self, config: ReFT, spec: SiteSpec) -> None:
        super().__init__()
        like = {"dtype": spec.dtype, "device": spec.device}
        self.form = config.form
        start = torch.empty(config.rank, spec.out_features, **like)
        self.R = nn.Parameter(nn.init.orthogonal_(start) if spec.device.type != "meta" else start)
        self.W = nn.Linear(spec.out_features, config.rank, **like)

    def change(self, h: Tensor) -> tuple[Tensor, Tensor]:
        """Return (the change within the subspace [..., r], R [r, D]) in the dtype of h."""
        R = (orthonormal_rows(self.R) if self.form == "loreft" else self.R).to(h.dtype)
        low = F.linear(h, self.W.weight.to(h.dtype), self.W.bias.to(h.dtype))  # W h + b
        return (low if self.form == "direft" else low - F.linear(h, R)), R


def orthonormal_rows(x: Tensor) -> Tensor:
    """Make the rows of x [r, D] orthonormal (Gram-Schmidt, by QR). The first keeps its direction, and orthonormal rows stay as they are."""
    Q, upper = torch.linalg.qr(x.t())  # QR leaves the signs open: a positive diagonal is Gram-Schmidt
    return (Q * torch.sign(upper.diagonal())).t()


class ReFTAdapter(Adapter):
    """One intervention for the prefix and one for the suffix, or a single one for both ends or all tokens."""

    reads = "nothing"
    reads_mask = True

    def __init__(self, config: ReFT, spec: SiteSpec) -> None:
        super().__init__(spec)
        self.p = config.dropout
        if config.rank > spec.out_features:
            raise GraftError(
                f"reft: rank {config.rank} is more than the {spec.out_features} dimensions at '{spec.module}': lower `rank`"
            )
        both = config.positions == "ends" and config.prefix and config.suffix and not config.tied
        self.units = nn.ModuleList(Intervention(config, spec) for _ in range(2 if both else 1))
        self.ends = None if config.positions == "all" else (config.prefix, config.suffix)

    def adapt(self, x: Tensor, h: Tensor, ctx: AdapterContext) -> Tensor:
        if self.ends is None:
            return h + self._change(self.units[0], h, ctx)
        first, last = chosen_positions(h, ctx, *self.ends)  # [B, L] each
        if len(self.units) == 1:
            return torch.where((first | last)[..., None], h + self._change(self.units[0], h, ctx), h)
        for unit, chosen in zip(self.units, (first, last), strict=True):
            h = torch.where(chosen[..., None], h + self._change(unit, h, ctx), h)
        return h

    def _change(self, unit: Any, h: Tensor, ctx: AdapterContext) -> Tensor:
        """Return what one intervention adds to h [..., D]."""
        low, R = unit.change(h)
        if self.training:
            low = ctx.dropout(low, self.p, self.site_index)
        return low @ R


def chosen_positions(h: Tensor, ctx: AdapterContext, prefix: int, suffix: int) -> tuple[Tensor, Tensor]:
    """Return two masks [B, L] (packed: [1, T]): h's tokens among the first `prefix`, and among the last `suffix`, of their sequences.

    Padding does not count. With the mask 0 0 1 1 1 1, prefix 1 and suffix 2, the masks are 0 0 1 0 0 0 and 0 0 0 0 1 1.
    """
    if torch.compiler.is_compiling():
        raise GraftError(
            "reft with positions: ends does not run compiled, because a graph does not know the padding: use positions: all"
        )
    length = h.shape[1]
    if ctx.flat:
        assert ctx.lengths is not None
        # Lengths (3, 2): position is 0 1 2 0 1, total is 3 3 3 2 2.
        position = torch.cat([torch.arange(n) for n in ctx.lengths]).to(h.device)[None]
        total = torch.cat([torch.full((n,), n) for n in ctx.lengths]).to(h.device)[None]
        return position < prefix, position >= total - suffix
    mask = ctx.mask
    if mask is None or mask.dim() != 2 or mask.shape[0] != h.shape[0] or mask.shape[1] < length:
        given = None if mask is None else tuple(mask.shape)
        raise GraftError(
            f"reft needs the attention mask [B, L] to find the ends of {h.shape[0]} sequences of length {length}; given: {given}. "
            "Call the whole model with an attention_mask, or use positions: all"
        )
    # The mask covers the S keys seen so far, h only the newest L of them. 0 0 1 1 1 1: position is -1 -1 0 1 2 3, total is 4.
    mask = mask.to(h.device).long()
    position, total = mask.cumsum(1) - 1, mask.sum(1, keepdim=True)
    real = mask.bool()[:, -length:]
    first = real & (position[:, -length:] < prefix)
    last = real & (position[:, -length:] >= total - suffix)
    # Generation goes on after the prompt: the tokens that it adds are not the end of what the model was given.
    return first, last if mask.shape[1] == length else torch.zeros_like(last)

"""OFT: the layer's input is rotated, block by block, before the frozen weight sees it.

    x'_n = x_n R_n                                     x_n [C] are the blocks of x, R_n [C, C] orthogonal
    R    = (1 + Q)(1 + Q + Q^2 + ... + Q^(T-2))        T terms, nearly Cayley's (1 + Q)(1 - Q)^-1
    R    = (1 - Q)(1 + Q)^-1                           exact Cayley; it turns the other way, as in PEFT
    Q    = U - U^T                                     U the trained upper triangle, at zero to begin with

COFT keeps each Q near zero: ||Q_n|| <= eps / sqrt(number of trained blocks); what is longer is shortened. Dropout lets a block of a token
pass unrotated.

Qiu et al. 2023, "Controlling Text-to-Image Diffusion by Orthogonal Finetuning" (arXiv 2306.07280); the input's side and the series are
from Qiu et al. 2025, "Orthogonal Finetuning Made Scalable" (arXiv 2506.19847).

Legend: I input features, O output features, N blocks, C block size, T terms.
"""

from __future__ import annotations

from typing import Any, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from graft.adapters.base import Adapter, AdapterConfig
from graft.adapters.surroundings import Surroundings
from graft.architectures.site import SiteSpec
from graft.errors import GraftError
from graft.routing.context import AdapterContext


class OFT(AdapterConfig):
    """Orthogonal fine-tuning: blocks of the input are rotated before a linear layer."""

    source = "arXiv 2306.07280"
    suits = "Rotations keep the angles between a layer's neurons, and so more of what the base knows; works on quantised bases."

    kind: Literal["oft"] = "oft"
    block_size: int | None = Field(default=32, ge=2)
    """Inputs in a block. Where it does not divide a layer's inputs, the nearest divisor is taken (of two the smaller). None: say
    `blocks`."""
    blocks: int | None = Field(default=None, ge=1)
    """Number of blocks, in place of their size; the nearest divisor is taken alike."""
    share: bool = False
    """Use one rotation for all blocks of a layer."""
    terms: int | None = Field(default=5, ge=2)
    """Terms of the series. None: the exact Cayley transform, which solves a linear system per block in every pass."""
    coft: float | None = Field(default=None, gt=0.0)
    """COFT's eps, which bounds how far a block turns; PEFT's is 6e-5. None: no bound."""
    dropout: float = Field(default=0.0, ge=0.0, lt=1.0)
    """Probability that a block of a token passes unrotated in training."""
    sites: str | tuple[str, ...] = "linear"

    @model_validator(mode="before")
    @classmethod
    def _blocks_stand_for_their_size(cls, given: Any) -> Any:
        alone = isinstance(given, dict) and given.get("blocks") is not None and "block_size" not in given
        return {**given, "block_size": None} if alone else given

    @model_validator(mode="after")
    def _one_says_the_blocks(self) -> Self:
        if (self.block_size is None) == (self.blocks is None):
            raise ValueError(f"give block_size or blocks; given block_size: {self.block_size}, blocks: {self.blocks}")
        return self

    @property
    def folds(self) -> bool:
        return True

    def size_at(self, inputs: int) -> int:
        """The block size of a layer with this many inputs."""
        if self.block_size is not None:
            return nearest_divisor(inputs, self.block_size)
        assert self.blocks is not None
        return inputs // nearest_divisor(inputs, self.blocks)

    def build(self, spec: SiteSpec) -> OFTAdapter:
        return OFTAdapter(self, spec)


def nearest_divisor(size: int, wanted: int) -> int:
    """The divisor of `size` nearest to `wanted`, the smaller of two."""
    return min((each for each in range(1, size + 1) if size % each == 0), key=lambda each: (abs(each - wanted), each))


class OFTAdapter(Adapter):
    """angles [N, C (C - 1) / 2], the upper triangles of the U by rows; [1, ...] where the blocks share theirs."""

    upper: Tensor

    def __init__(self, config: OFT, spec: SiteSpec) -> None:
        super().__init__(spec)
        self.p, self.terms, self.size = config.dropout, config.terms, config.size_at(spec.in_features)
        if self.size == 1:
            raise GraftError(
                f"block_size, blocks: '{spec.module}' has {spec.in_features} inputs, which would fall into blocks of one: "
                "such a block has nothing to turn. Name a size nearer to a larger divisor"
            )
        self.blocks = spec.in_features // self.size
        trained = 1 if config.share else self.blocks
        self.bound = None if config.coft is None else config.coft / trained**0.5
        rows, columns = torch.triu_indices(self.size, self.size, 1, device=spec.device)
        self.register_buffer("upper", rows * self.size + columns, persistent=False)
        self.angles = nn.Parameter(torch.zeros(trained, len(self.upper), dtype=spec.dtype, device=spec.device))

    def on_install(self, around: Surroundings) -> None:
        super().on_install(around)
        if around.features is not None:
            around.weight()  # a slice is computed with it: said now where it is not at hand

    def _short_enough(self) -> Tensor:
        """The angles, no longer than COFT allows."""
        if self.bound is None:
            return self.angles
        length = 2**0.5 * self.angles.norm(dim=1, keepdim=True)  # of Q, which holds each angle twice
        return self.angles * (self.bound / length.clamp_min(self.bound))

    @torch.no_grad()
    def after_step(self, step: int, steps: int) -> None:
        if self.bound is not None:
            self.angles.copy_(self._short_enough())

    def change(self) -> Tensor:
        """R - 1 for each block [N, C, C], in the masters' precision: small rotations are lost in a rounded R."""
        angles = self.angles + (self._short_enough() - self.angles).detach()  # gradients as if nothing were shortened
        U = angles.new_zeros(len(angles), self.size**2).index_copy(1, self.upper, angles).unflatten(1, (-1, self.size))
        Q = U - U.mT
        if self.terms is None:
            one = torch.eye(self.size, dtype=Q.dtype, device=Q.device)
            change = torch.linalg.solve(one + Q, -2 * Q, left=False)
        else:
            change = Q  # Horner's rule for 2 Q + ... + 2 Q^(T-2) + Q^(T-1)
            for _ in range(self.terms - 2):
                change = 2 * Q + Q @ change
        return change.expand(self.blocks, -1, -1)

    def turned(self, x: Tensor, ctx: AdapterContext) -> Tensor:
        """What the rotation adds to x. [..., I] -> [..., I]."""
        x_NC = x.unflatten(-1, (self.blocks, self.size))
        added_NC = torch.einsum("...nc,ncd->...nd", x_NC, self.change().to(x.dtype))
        if self.training and self.p:
            kept_N = ctx.dropout(x.new_ones(x_NC.shape[:-1]), self.p, self.site_index) > 0
            added_NC = added_NC * kept_N[..., None]
        return added_NC.flatten(-2)

    def before(self, x: Tensor, ctx: AdapterContext) -> Tensor:
        return x if self.around.features is not None else x + self.turned(x, ctx)

    def adapt(self, x: Tensor, h: Tensor, ctx: AdapterContext) -> Tensor:
        if self.around.features is None:
            return h
        turned = self.turned(x.to(h.dtype), ctx)  # a slice of a fused layer shares its input with the others
        return h + self.around.product(turned)

    def fold(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        if self.around.features is None:
            return weight, bias
        return weight + self._turned_weight(self.around.weight().to(weight.dtype)), bias

    def fold_input(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        if self.around.features is not None:
            return weight, bias
        return weight + self._turned_weight(weight), bias

    def _turned_weight(self, weight: Tensor) -> Tensor:
        """What the rotation adds to a weight [O, I]."""
        W_ONC = weight.unflatten(-1, (self.blocks, self.size))
        return torch.einsum("onc,ndc->ond", W_ONC, self.change().to(weight.dtype)).flatten(-2)

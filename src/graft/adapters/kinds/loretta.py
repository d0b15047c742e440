"""LoRETTA: adapters with tensor trains (TT) in place of matrices.

    loretta-adp, a series adapter:     h' = h + s TT_up(act(TT_down(h)))
    loretta-rep, a low-rank update:    h' = h + alpha / M (TT_B(TT_A(dropout(x))) - its initial value)

Subtracting the initial value makes training start at the base exactly, as in the paper. The released code does not subtract it
(`init_residual: false`).

Yang et al. 2024, "LoRETTA" (arXiv 2402.11417).

Legend: I input width, O output width, M bottleneck.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field
from torch import Tensor, nn

from graft.adapters.base import Adapter, AdapterConfig
from graft.adapters.kinds.series import SeriesConfig
from graft.adapters.parts.tensor_train import FrozenTrain, TensorTrain
from graft.architectures.site import SiteSpec
from graft.routing.context import AdapterContext


class LorettaAdp(SeriesConfig):
    """Series adapter with tensor trains in place of matrices."""

    source = "arXiv 2402.11417"
    suits = "610,560 parameters on LLaMA-7B, where a series adapter of dense matrices has 50,331,648."

    kind: Literal["loretta-adp"] = "loretta-adp"
    tt_rank: int = Field(default=5, ge=1)
    """Rank of the tensor trains."""
    biases: bool = True
    """Whether down and up have biases. They start like those of nn.Linear, so a fresh adapter is not the identity."""
    sites: str | tuple[str, ...] = "attn mlp"

    @property
    def starts_as_identity(self) -> bool:
        return False

    def layers(self, spec: SiteSpec, width_in: int, width_out: int) -> tuple[nn.Module, nn.Module]:
        down = TensorTrain(spec, width_in, self.bottleneck, self.tt_rank, self.biases)
        return down, TensorTrain(spec, self.bottleneck, width_out, self.tt_rank, self.biases)


class LorettaRep(AdapterConfig):
    """Low-rank update of tensor trains beside a linear layer."""

    source = "arXiv 2402.11417"
    suits = "LoRA in tensor trains, for when the size of the file matters most. Can be merged."

    kind: Literal["loretta-rep"] = "loretta-rep"
    bottleneck: int = Field(default=8, ge=1)
    """Width between the two trains, which is the rank of the update."""
    tt_rank: int = Field(default=5, ge=1)
    """Rank of the tensor trains."""
    alpha: float = 16.0
    """Numerator of the scale alpha / bottleneck of the update."""
    dropout: float = Field(default=0.0, ge=0.0, lt=1.0)
    """Dropout on the adapter's input. The paper's runs use 0.05."""
    init_residual: bool = True
    """Subtract the random initial value of the trains, so that a fresh adapter is the identity (the paper). false: the released code."""
    sites: str | tuple[str, ...] = "attn.q attn.v"

    @property
    def starts_as_identity(self) -> bool:
        return self.init_residual

    @property
    def folds(self) -> bool:
        return True

    def build(self, spec: SiteSpec) -> LorettaRepAdapter:
        return LorettaRepAdapter(self, spec)


class LorettaRepAdapter(Adapter):
    """Trains A [I, M] and B [M, O]. With `init_residual` it also holds their frozen initial values, a few hundred numbers."""

    def __init__(self, config: LorettaRep, spec: SiteSpec) -> None:
        super().__init__(spec)
        self.scale, self.p = config.alpha / config.bottleneck, config.dropout
        self.A = TensorTrain(spec, spec.in_features, config.bottleneck, config.tt_rank, biases=False)
        self.B = TensorTrain(spec, config.bottleneck, spec.out_features, config.tt_rank, biases=False)
        trains = {"A": FrozenTrain(self.A), "B": FrozenTrain(self.B)}
        self.start = nn.ModuleDict(trains) if config.init_residual else None

    def adapt(self, x: Tensor, h: Tensor, ctx: AdapterContext) -> Tensor:
        if self.training:
            x = ctx.dropout(x, self.p, self.site_index)
        x = x.to(h.dtype)
        update = self.B(self.A(x))  # [..., M] -> [..., O]
        if self.start is not None:
            update = update - self.start["B"](self.start["A"](x))
        return h + self.scale * update

    def fold(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        update_IO = self.A.weight() @ self.B.weight()
        if self.start is not None:
            update_IO = update_IO - self.start["A"].weight() @ self.start["B"].weight()  # pyright: ignore
        return weight + (self.scale * update_IO.t()).to(weight.dtype), bias

"""LoRETTA: adapters whose matrices are tensor trains.

adp: a series adapter, h' = h + s * TT_up(act(TT_down(h))).
rep: a low-rank difference, h' = h + alpha / M * (TT_B(TT_A(x)) - its start), which begins at the base exactly.

Yang et al. 2024, "LoRETTA" (arXiv 2402.11417). The paper takes the start away so that training begins at the base; its code does not
(`init_residual: false`).

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
    """A series adapter of tensor trains."""

    source = "arXiv 2402.11417"
    suits = "A series adapter of 610,560 parameters on LLaMA-7B where dense matrices take 50,331,648."

    kind: Literal["loretta-adp"] = "loretta-adp"
    tt_rank: int = Field(default=5, ge=1)
    """Rank of the trains."""
    biases: bool = True
    """Whether down and up have biases. They start like nn.Linear's, so a fresh adapter is not the identity."""
    sites: str | tuple[str, ...] = "attn mlp"

    @property
    def starts_as_identity(self) -> bool:
        return False

    def layers(self, spec: SiteSpec, width_in: int, width_out: int) -> tuple[nn.Module, nn.Module]:
        down = TensorTrain(spec, width_in, self.bottleneck, self.tt_rank, self.biases)
        return down, TensorTrain(spec, self.bottleneck, width_out, self.tt_rank, self.biases)


class LorettaRep(AdapterConfig):
    """A low-rank difference of tensor trains beside a linear layer."""

    source = "arXiv 2402.11417"
    suits = "LoRA in tensor trains, for where the size of what is sent or stored counts most; merges."

    kind: Literal["loretta-rep"] = "loretta-rep"
    bottleneck: int = Field(default=8, ge=1)
    """Width between the two trains, the rank of the difference."""
    tt_rank: int = Field(default=5, ge=1)
    """Rank of the trains."""
    alpha: float = 16.0
    """Numerator of the scale; the difference is multiplied by alpha / bottleneck."""
    dropout: float = Field(default=0.0, ge=0.0, lt=1.0)
    """Dropout on the input (the paper's runs use 0.05)."""
    init_residual: bool = True
    """Take the trains' random start away, so that a fresh adapter is the identity (the paper); false keeps it (the released code)."""
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
    """Trains A [I, M] and B [M, O]; with `init_residual` their start stays beside them, frozen (a few hundred numbers)."""

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
        change = self.B(self.A(x))
        if self.start is not None:
            change = change - self.start["B"](self.start["A"](x))
        return h + self.scale * change

    def fold(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        change = self.A.weight() @ self.B.weight()
        if self.start is not None:
            change = change - self.start["A"].weight() @ self.start["B"].weight()  # pyright: ignore
        return weight + (self.scale * change.t()).to(weight.dtype), bias

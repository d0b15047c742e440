"""LoRA: a low-rank update of frozen weights.

    linear layer    h' = h + s B A dropout(x),    s = alpha / rank
    embedding       h' = h + s B A[:, token]
    experts         W_e' = W_e + s B_e A_e for each expert e that one three-dimensional weight holds

`rslora` sets s = alpha / sqrt(rank), and `lr_ratio` trains B with a multiple of A's learning rate. At an embedding, the base's own forward
looks up the rows of A^T, so an embedding that scales its output scales the update too. A head that shares the embedding's weight keeps the
base's weight.

Hu et al. 2021, "LoRA" (arXiv 2106.09685); Kalajdzievski 2023, "rsLoRA" (arXiv 2312.03732); Hayou et al. 2024, "LoRA+" (arXiv 2402.12354).

Legend: I input features, O output features, R rank; of an embedding V rows and D width; E experts.
"""

from __future__ import annotations

import math
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from graft.adapters.base import Adapter
from graft.adapters.hooks import ExpertsAdapter
from graft.adapters.parts.weight_delta import LowRank, WeightDelta
from graft.adapters.surroundings import Surroundings
from graft.architectures.site import SiteSpec, SiteType
from graft.ops.base_copy import embedding_copy
from graft.ops.low_rank import add_low_rank
from graft.ops.low_rank_update import LowRankUpdate
from graft.routing.context import AdapterContext


class LoRAFields(LowRank):
    """The settings of the kinds that train a pair A, B: LoRA, DoRA, PiSSA."""

    down = ("A",)

    rslora: bool = False
    """Scale by alpha / sqrt(rank) instead of alpha / rank."""
    lr_ratio: float = Field(default=1.0, gt=0.0)
    """LoRA+: the learning rate of B (and of biases and magnitudes) divided by that of A. The paper advises 16. Graft's runs apply it. An
    optimiser of your own needs the parameter groups of `graft.parameter_groups`; an optimiser that a Trainer makes ignores it."""
    train_bias: bool = False
    """Also train the layer's bias, stored as a difference from the base's."""

    @property
    def scale(self) -> float:
        return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)


class LoRA(LoRAFields):
    """Low-rank update alpha / rank * B A of linear layers, embeddings and experts. Dropout acts only at linear layers."""

    takes: ClassVar[frozenset[SiteType]] = frozenset({"linear", "embedding", "experts"})
    source = "arXiv 2106.09685"
    suits = "The usual first choice: small files, no cost once merged, and every server supports it."

    kind: Literal["lora"] = "lora"

    def build(self, spec: SiteSpec) -> LoRAAdapter | LoRAEmbedding | LoRAExperts:
        if spec.type == "experts":
            return LoRAExperts(self.rank, self.scale, self.lr_ratio, spec)
        if spec.type == "embedding":
            return LoRAEmbedding(self.rank, self.scale, spec)
        return LoRAAdapter(self, spec)


class LoRAAdapter(WeightDelta):
    """A [R, I] starts kaiming-uniform, B [O, R] at zero."""

    def __init__(self, config: LoRAFields, spec: SiteSpec) -> None:
        super().__init__(spec, config.dropout)
        like = {"dtype": spec.dtype, "device": spec.device}
        self.scale, self.lr_ratio = config.scale, config.lr_ratio
        self.A = nn.Parameter(torch.empty(config.rank, spec.in_features, **like))
        self.B = nn.Parameter(torch.zeros(spec.out_features, config.rank, **like))
        self.bias = nn.Parameter(torch.zeros(spec.out_features, **like)) if config.train_bias else None
        nn.init.kaiming_uniform_(self.A, a=math.sqrt(5))

    def lr_factor(self, parameter: str) -> float:
        return 1.0 if parameter == "A" else self.lr_ratio

    def apply_to(self, x: Tensor) -> Tensor:
        low_R = F.linear(x, self.A.to(x.dtype))  # [..., R]
        return F.linear(low_R * self.scale, self.B.to(x.dtype))  # [..., O]

    def difference(self) -> Tensor:
        return self.scale * (self.B @ self.A)  # [O, I]

    def adapt(self, x: Tensor, h: Tensor, ctx: AdapterContext) -> Tensor:
        h = add_low_rank(x.to(h.dtype), h, [self.update(ctx)])
        return h if self.bias is None else h + self.bias.to(h.dtype)

    def update(self, ctx: AdapterContext, rows: slice | None = None) -> LowRankUpdate:
        """Return what `adapt` adds to h on these rows, without the bias."""
        return LowRankUpdate(self.A, self.B, self.scale, self.p if self.training else 0.0, self.site_index, ctx, rows)

    def low_rank(self, ctx: AdapterContext, rows: slice | None = None) -> LowRankUpdate | None:
        # DoRA and PiSSA compute more than the update, as their own `adapt` says.
        nothing_else = self.bias is None and type(self).adapt is LoRAAdapter.adapt
        return self.update(ctx, rows) if nothing_else else None

    def fold(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        weight, bias = super().fold(weight, bias)
        if self.bias is not None:
            bias = self.bias.to(weight.dtype) if bias is None else bias + self.bias.to(bias.dtype)
        return weight, bias


class LoRAEmbedding(Adapter):
    """A [R, V] starts at zero and B [D, R] from N(0, 1), as in PEFT. Each token reads its own column of A."""

    def __init__(self, rank: int, scale: float, spec: SiteSpec) -> None:
        super().__init__(spec)
        like = {"dtype": spec.dtype, "device": spec.device}
        self.scale = scale
        self.A = nn.Parameter(torch.zeros(rank, spec.in_features, **like))
        self.B = nn.Parameter(torch.randn(spec.out_features, rank, **like))

    def on_install(self, around: Surroundings) -> None:
        super().on_install(around)
        self._base_copy = (embedding_copy(around.host),)

    def adapt(self, x: Tensor, h: Tensor, ctx: AdapterContext) -> Tensor:
        low_R = self._base_copy[0].run({"weight": self.A.t()}, x).to(h.dtype)  # token ids [...] -> [..., R]
        return h + F.linear(low_R * self.scale, self.B.to(h.dtype))

    def fold(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        return weight + self.scale * (self.B @ self.A).t().to(weight.dtype), bias


class LoRAExperts(ExpertsAdapter):
    """A [E, R, I] starts kaiming-uniform, each expert by itself; B [E, O, R] starts at zero.

    PEFT stores the same as `target_parameters`: lora_A is [E R, I] with expert e in the rows e R to (e + 1) R, and lora_B is [O, R E] with
    expert e in the columns e, E + e, 2 E + e, ... With E = 2 and R = 3, rows 3 to 5 of lora_A and columns 1, 3, 5 of lora_B are expert 1.
    """

    def __init__(self, rank: int, scale: float, lr_ratio: float, spec: SiteSpec) -> None:
        super().__init__(spec)
        like = {"dtype": spec.dtype, "device": spec.device}
        self.scale, self.lr_ratio = scale, lr_ratio
        self.A = nn.Parameter(torch.empty(spec.num_experts, rank, spec.in_features, **like))
        self.B = nn.Parameter(torch.zeros(spec.num_experts, spec.out_features, rank, **like))
        # Seen as one matrix [E R, I], the fan-in is I, as for each expert by itself.
        nn.init.kaiming_uniform_(self.A.view(-1, spec.in_features), a=math.sqrt(5))

    def lr_factor(self, parameter: str) -> float:
        return 1.0 if parameter == "A" else self.lr_ratio

    def changed(self, weight: Tensor) -> Tensor:
        A, B = self.A.to(weight.dtype), self.B.to(weight.dtype)
        # W_e is stored as [O, I] or, by some families, transposed as [I, O]; then the update is A_e^T B_e^T.
        first, second = (A.transpose(1, 2), B.transpose(1, 2)) if self.transposed else (B, A)
        return torch.baddbmm(weight, first, second, alpha=self.scale)

"""MiSS: one small trained matrix that all shards of a layer's input share.

    plain:  h' = h + D^T (x_1 + x_2 + ... + x_N)     x_n [R] are the shards of dropout(x); zeros fill up the last one
    mini:   the same, with D [R, M] repeated along the outputs until it is [R, O]
    bat:    W'_ij = W_ij + (W_ij + 1) D_i            W_ij [R, R] are the blocks of the frozen weight, each row of blocks has its D_i

All start at D = 0. Plain and mini cost a sum and a product with D; bat writes its matrix out in every pass.

Kang and Yin 2024, "MiSS: Balancing LoRA Performance and Efficiency with Simple Shard Sharing" (arXiv 2409.15371); bat is the block-affine
transformation of its first version.

Legend: I input features, O output features, R rank (size of a shard), N shards, M mini rank.
"""

from __future__ import annotations

import math
from typing import Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn import functional as F

from graft.adapters.base import AdapterConfig
from graft.adapters.parts.dense_delta import DenseDelta
from graft.adapters.parts.weight_delta import WeightDelta
from graft.architectures.site import SiteSpec
from graft.errors import GraftError


class MiSS(AdapterConfig):
    """One small matrix that all shards of a layer's input share."""

    source = "arXiv 2409.15371"
    suits = "About half of LoRA's parameters at the same rank, and a single matrix to tune."

    kind: Literal["miss"] = "miss"
    rank: int = Field(default=16, ge=1)
    """Size of a shard of the input, at most the layer's inputs. 16 trains about as much as LoRA's default; PEFT's is 64."""
    variant: Literal["plain", "bat", "mini"] = "plain"
    """plain: a matrix of rank x outputs. mini: of rank x mini_rank, repeated along the outputs. bat: a square block for each `rank`
    outputs, multiplied with the frozen weight; the rank divides inputs and outputs."""
    mini_rank: int = Field(default=1, ge=1)
    """Columns of the matrix that mini repeats; a divisor of the layer's outputs."""
    dropout: float = Field(default=0.0, ge=0.0, lt=1.0)
    """Dropout on the adapter's input."""
    sites: str | tuple[str, ...] = "linear"

    @model_validator(mode="after")
    def _mini_rank_has_an_effect(self) -> Self:
        if self.mini_rank != 1 and self.variant != "mini":
            raise ValueError(f"mini_rank: {self.mini_rank} has an effect with variant: mini only; given {self.variant}")
        return self

    @property
    def folds(self) -> bool:
        return True

    def build(self, spec: SiteSpec) -> MiSSAdapter | BatAdapter:
        return BatAdapter(self, spec) if self.variant == "bat" else MiSSAdapter(self, spec)


class MiSSAdapter(WeightDelta):
    """D [R, O], of which mini holds the first M columns."""

    def __init__(self, config: MiSS, spec: SiteSpec) -> None:
        super().__init__(spec, config.dropout)
        rank = config.rank
        columns = config.mini_rank if config.variant == "mini" else spec.out_features
        if rank > spec.in_features:
            raise GraftError(f"rank: a shard of {rank} is larger than the {spec.in_features} inputs of '{spec.module}'")
        if spec.out_features % columns:
            raise GraftError(f"mini_rank: {columns} does not divide the {spec.out_features} outputs of '{spec.module}'")
        self.rank, self.inputs = rank, spec.in_features
        self.shards, self.copies = math.ceil(spec.in_features / rank), spec.out_features // columns
        self.D = nn.Parameter(torch.zeros(rank, columns, dtype=spec.dtype, device=spec.device))

    def apply_to(self, x: Tensor) -> Tensor:
        if missing := self.shards * self.rank - self.inputs:
            x = F.pad(x, (0, missing))
        x_NR = x.unflatten(-1, (self.shards, self.rank))  # [..., N, R]
        h_M = x_NR.sum(-2) @ self.D.to(x.dtype)  # [..., M]
        return h_M if self.copies == 1 else h_M.tile(self.copies)  # [..., O]

    def difference(self) -> Tensor:
        return self.D.t().repeat(self.copies, self.shards)[:, : self.inputs]


class BatAdapter(DenseDelta):
    """D [O / R, R, R], a block for each R outputs."""

    reads_weight = True

    def __init__(self, config: MiSS, spec: SiteSpec) -> None:
        super().__init__(spec, config.dropout)
        self.rank = rank = config.rank
        if spec.in_features % rank or spec.out_features % rank:
            sizes = f"{spec.in_features} inputs and {spec.out_features} outputs of '{spec.module}'"
            raise GraftError(f"rank: variant bat needs one that divides the {sizes}; given {rank}")
        self.D = nn.Parameter(torch.zeros(spec.out_features // rank, rank, rank, dtype=spec.dtype, device=spec.device))

    def difference(self) -> Tensor:
        weight = self.around.weight().to(self.D.dtype)
        WD = weight.reshape(len(self.D), -1, self.rank) @ self.D  # [O / R, I, R]: all W_ij D_i of one i
        return WD.reshape_as(weight) + self.D.flatten(0, 1).repeat(1, weight.shape[1] // self.rank)  # [O, I]

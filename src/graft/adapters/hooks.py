"""The two hooks that are not around a module: inside an attention, and before the embedded sequence.

Legend: B rows, L length, H query heads, K key-value heads, D head size (of an embedding: its width), P virtual tokens.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from graft.adapters.base import Adapter
from graft.adapters.surroundings import Surroundings
from graft.architectures.experts import PARTS, expert_sizes
from graft.architectures.site import SiteSpec
from graft.routing.context import AdapterContext


class AttentionAdapter(Adapter):
    """An adapter inside an attention module: extra keys and values in its softmax, or a second attention beside it."""

    position_shift: int = 0
    """Positions by which the real sequence is moved to the right."""
    windowed: bool = False
    """Whether a layer's sliding window hides its virtual tokens, as it hides real ones."""
    cached_kv: ClassVar[bool] = False
    """Whether the keys come out of the model itself, which has shown the tokens all others."""

    adapts_output_projection: bool = False
    """Whether `adapt` changes the output projection's output too, after the attention in the same pass."""

    def start_at(self, keys: Tensor, values: Tensor) -> None:
        """Begin with the base's keys and values [P, K, D] of the config's `starts_from`, rotated as it rotates them."""
        raise NotImplementedError

    def keys_values(self) -> tuple[Tensor, Tensor]:
        """Keys and values [P, K, D] of P virtual tokens for K key-value heads of size D; keys are not rotated."""
        raise NotImplementedError

    def beside(self, query: Tensor, scaling: float, ctx: AdapterContext) -> Tensor:
        """A second attention, whose output is added to the module's own. query: [B, L, H, D] -> [B, L, H, D]."""
        raise NotImplementedError


class EmbeddingAdapter(Adapter):
    """An adapter of the input embedding: virtual tokens before the sequence."""

    tokens: int
    """Virtual tokens, P."""
    windowed: bool = False
    """Whether a layer's sliding window hides them from a causal sequence, as it hides real ones."""
    after_positions: bool = False
    """Whether they stand behind an encoder's position embeddings, in front of its first block."""

    def prompt(self) -> Tensor:
        """Their embeddings [P, D]."""
        raise NotImplementedError


class ExpertsAdapter(Adapter):
    """An adapter of one such parameter."""

    def __init__(self, spec: SiteSpec) -> None:
        super().__init__(spec)
        self.part = spec.name.rpartition(".")[2]
        self.hidden = spec.out_features if self.part == "down" else spec.in_features

    @property
    def parameter(self) -> str:
        """The parameter's name in the module."""
        return PARTS[self.part]

    def on_install(self, around: Surroundings) -> None:
        super().on_install(around)
        self.transposed = expert_sizes(around.host, self.part, self.hidden)[-1]

    def changed(self, weight: Tensor) -> Tensor:
        """The weight that base plus adapter compute with, of the shape and dtype of the one given."""
        raise NotImplementedError

    def fold_all(self) -> dict[str, Tensor]:
        own = self.around.host.get_parameter(self.parameter)
        return {self.parameter: self.changed(own.detach().to(torch.promote_types(own.dtype, torch.float32)))}

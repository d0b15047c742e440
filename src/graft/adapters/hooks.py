"""The adapters that do not act around a module: in an attention, before the embedded sequence, and on the weights of experts.

Legend: B rows, L length, H query heads, K key-value heads, D head size (or width of an embedding), P virtual tokens,
R rows of one adapter, C features of the attention's input.
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

ALL_ROWS = AdapterContext()


class AttentionAdapter(Adapter):
    """An adapter in an attention module: more keys and values in its softmax, or a second attention that is added to it."""

    position_shift: int = 0
    """The number of positions by which the real sequence is moved to the right."""
    windowed: bool = False
    """Whether a layer's sliding window hides the virtual tokens, as it hides real ones."""
    cached_kv: ClassVar[bool] = False
    """Whether the model itself computes the keys of its tokens, which have then seen all other virtual tokens."""
    reads = "nothing"
    """Set `input` to get the input x of the attention module in `keys_values` and `beside`."""
    per_row: bool = False
    """Whether `keys_values` returns those of each row, [R, P, K, D]. It is then called for every group of the adapter's rows."""
    adapts_output_projection: bool = False
    """Whether `adapt` changes the output of the output projection too."""

    @property
    def adds_attention(self) -> bool:
        """Whether it adds a second attention, `beside`. Otherwise it has `keys_values`."""
        return type(self).beside is not AttentionAdapter.beside

    def start_at(self, keys: Tensor, values: Tensor) -> None:
        """Start at keys and values [P, K, D] that the base computed for the tokens `starts_from`, rotated as the base rotates them."""
        raise NotImplementedError

    def keys_values(self, x: Tensor | None = None, ctx: AdapterContext = ALL_ROWS) -> tuple[Tensor, Tensor]:
        """Return keys and values of P virtual tokens: [P, K, D] for all rows or, with `per_row`, [R, P, K, D]. The keys are not rotated.

        x: [R, L, C] (padding-free [1, T, C]), the attention's input in these rows, if the adapter `reads` it.
        """
        raise NotImplementedError

    def beside(self, query: Tensor, scaling: float, ctx: AdapterContext, x: Tensor | None = None) -> Tensor:
        """Return the output of a second attention, which is added to the module's own. query: [B, L, H, D] -> [B, L, H, D].

        x: [B, L, C], the attention's input, if the adapter `reads` it.
        """
        raise NotImplementedError


class EmbeddingAdapter(Adapter):
    """An adapter of the input embedding: virtual tokens before the sequence."""

    tokens: int
    """The number of virtual tokens, P."""
    windowed: bool = False
    """Whether a layer's sliding window hides them from a causal sequence, as it hides real tokens."""
    after_positions: bool = False
    """Whether they are added after an encoder's position embeddings, right before its first block."""

    def prompt(self) -> Tensor:
        """Return the embeddings [P, D] of the virtual tokens."""
        raise NotImplementedError


class ExpertsAdapter(Adapter):
    """An adapter of one three-dimensional parameter that holds the weights of all experts of a module."""

    def __init__(self, spec: SiteSpec) -> None:
        super().__init__(spec)
        self.part = spec.name.rpartition(".")[2]
        self.hidden = spec.out_features if self.part == "down" else spec.in_features

    @property
    def parameter(self) -> str:
        """The name of the parameter in the module."""
        return PARTS[self.part]

    def on_install(self, around: Surroundings) -> None:
        super().on_install(around)
        self.transposed = expert_sizes(around.host, self.part, self.hidden)[-1]

    def changed(self, weight: Tensor) -> Tensor:
        """Return the weight with the adapter in it, W + D, in the shape and dtype of the given one."""
        raise NotImplementedError

    def fold_all(self) -> dict[str, Tensor]:
        own = self.around.host.get_parameter(self.parameter)
        return {self.parameter: self.changed(own.detach().to(torch.promote_types(own.dtype, torch.float32)))}

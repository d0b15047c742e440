"""The frozen modules around an adapter, for the kinds that compute with them.

Legend: [..., I] input features, [..., O] output features.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from graft.errors import GraftError


@dataclass(frozen=True, eq=False)
class Surroundings:
    """The frozen modules at a site, for the kinds whose equations speak of them. No adapter owns or changes them."""

    host: nn.Module
    """The module whose output is h."""
    features: slice | Tensor | None = None
    """The rows of its output that the site is; None for all."""
    norm: nn.Module | None = None
    """The norm that a post-norm family (BERT) applies to h + residual right after this sublayer."""
    projections: Mapping[str, Surroundings] = field(default_factory=dict)
    """Of an attention module: what makes its queries, keys, values and output ("q", "k", "v", "o"), as far as the family tells."""

    def apply(self, x: Tensor) -> Tensor:
        """The site's own output, without adapters. x: [..., I] -> [..., O]."""
        h = frozen(self.host, x)
        return h if self.features is None else h[..., self.features]

    def weight(self) -> Tensor:
        """The frozen weight of the site [O, I], whichever way the host stores it. Raises `GraftError` where it is not at hand."""
        weight = getattr(self.host, "weight", None)
        if not isinstance(weight, Tensor) or not weight.is_floating_point():
            raise GraftError(
                f"this adapter reads the frozen weight, which {type(self.host).__name__} holds in quantised form or not at all: "
                "load the base in bfloat16 or float32, or choose another kind (lora)"
            )
        if type(self.host).__name__ == "Conv1D":  # transformers' transposed linear layer
            weight = weight.t()
        return weight if self.features is None else weight[self.features]

    def bias(self) -> Tensor | None:
        """The frozen bias of the site [O], or None."""
        bias = getattr(self.host, "bias", None)
        return bias if bias is None or self.features is None else bias[self.features]


def frozen(module: nn.Module, *args: Any) -> Any:
    """A frozen module's own forward, past the adapters that it hosts."""
    own = getattr(type(module), "graft_base", None)
    return module(*args) if own is None else own.forward(module, *args)

"""The frozen modules around an adapter, for kinds that compute with them.

Legend: [..., I] input features, [..., O] output features.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from graft.architectures.layers import holds_numbers
from graft.errors import GraftError


@dataclass(frozen=True, eq=False)
class Surroundings:
    """The frozen modules at a site, for kinds with equations that contain them. No adapter owns or changes them."""

    host: nn.Module
    """The module with the output h."""
    features: slice | Tensor | None = None
    """The output features of the host that are the site; None for all."""
    norm: nn.Module | None = None
    """In a post-norm family (BERT): the norm of h + residual after this sublayer."""
    projections: Mapping[str, Surroundings] = field(default_factory=dict)
    """For an attention module: the layers that make its queries, keys, values and output ("q", "k", "v", "o"), if the family knows them."""

    def apply(self, x: Tensor) -> Tensor:
        """Return the output of the site without adapters. x: [..., I] -> [..., O]."""
        h = frozen(self.host, x)
        return h if self.features is None else h[..., self.features]

    def weight(self) -> Tensor:
        """Return the frozen weight of the site [O, I], also if the host stores its transpose. Raises `GraftError` if it is quantised."""
        weight = getattr(self.host, "weight", None)
        if not isinstance(weight, Tensor) or not holds_numbers(weight):
            raise GraftError(
                f"this adapter reads the frozen weight, but {type(self.host).__name__} has none in floating point: "
                "load the base in bfloat16 or float32, or choose another kind (lora)"
            )
        if type(self.host).__name__ == "Conv1D":  # transformers' transposed linear layer
            weight = weight.t()
        return weight if self.features is None else weight[self.features]

    def bias(self) -> Tensor | None:
        """Return the frozen bias of the site [O], or None."""
        bias = getattr(self.host, "bias", None)
        return bias if bias is None or self.features is None else bias[self.features]


def frozen(module: nn.Module, *args: Any) -> Any:
    """Run a frozen module's own forward, without the adapters that it hosts."""
    own = getattr(type(module), "graft_base", None)
    return module(*args) if own is None else own.forward(module, *args)

"""The frozen modules around an adapter, for kinds that compute with them.

Legend: [..., I] input features, [..., O] output features.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from graft.architectures.layers import holds_numbers
from graft.distributed.sharded import full
from graft.errors import GraftError
from graft.ops.packed import dequantised, packed_product, packed_weight


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
    causal: bool = False
    """Whether tokens here depend on earlier ones only, so that generation may compute them one by one."""
    answers: bool = False
    """Whether it is in a decoder behind an encoder, where the mask of a call is that of the encoder's tokens."""

    def apply(self, x: Tensor) -> Tensor:
        """Return the output of the site without adapters. x: [..., I] -> [..., O]."""
        h = frozen(self.host, x)
        return h if self.features is None else h[..., self.features]

    def weight(self) -> Tensor:
        """Return the frozen weight of the site [O, I], also if the host stores its transpose.

        That of a quantised layer is dequantised at each call: whoever keeps it keeps what quantising saved. Raises `GraftError` if the host
        has no weight, or one that cannot be dequantised here.
        """
        weight = dequantised(self.host)
        if weight is None:
            weight = getattr(self.host, "weight", None)
            weight = full(weight) if isinstance(weight, Tensor) else None
        if not isinstance(weight, Tensor) or not holds_numbers(weight):
            raise GraftError(
                f"this adapter reads the frozen weight, but {type(self.host).__name__} has none in floating point, and Graft cannot "
                "dequantise it: load the base in bfloat16 or float32, or choose another kind (lora)"
            )
        if type(self.host).__name__ == "Conv1D":  # transformers' transposed linear layer
            weight = weight.t()
        return weight if self.features is None else weight[self.features]

    def product(self, x: Tensor) -> Tensor:
        """Return x W^T for the frozen weight W of the site, without the bias. x: [..., I] -> [..., O].

        Of a quantised layer backward dequantises W again, so that it is not kept.
        """
        packed = packed_weight(self.host)
        if packed is not None:
            return packed_product(x, packed, rows=self.features)
        return F.linear(x, self.weight().to(x.dtype))

    def bias(self) -> Tensor | None:
        """Return the frozen bias of the site [O], or None."""
        bias = getattr(self.host, "bias", None)
        bias = None if bias is None else full(bias)
        return bias if bias is None or self.features is None else bias[self.features]


def frozen(module: nn.Module, *args: Any) -> Any:
    """Run a frozen module's own forward, without the adapters that it hosts."""
    own = getattr(type(module), "graft_base", None)
    return module(*args) if own is None else own.forward(module, *args)

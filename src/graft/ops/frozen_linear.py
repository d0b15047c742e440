"""A frozen linear layer that our autograd nodes compute with: its weight in the dtype of the input, dense or dequantised at each use.

Supported are plain `nn.Linear` layers, `Int8Linear`, and the 4-bit layers of bitsandbytes while gradients are recorded. Without gradients
the 4-bit layers keep their own forward, which has kernels for few tokens. The 8-bit layers of bitsandbytes itself always keep theirs: they
round the input too, which no dense weight can express.

Legend: I input features, O output features, N tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from graft.architectures.eight_bit import is_eight_bit
from graft.architectures.four_bit import is_four_bit
from graft.architectures.walk import plain_class
from graft.ops.low_rank_update import as_matrix
from graft.ops.packed import Dense, packed_weight


@dataclass(frozen=True, eq=False)
class FrozenLinear:
    """A frozen layer x W^T + b."""

    stored: Tensor
    """W [O, I], or the codes that are stored for it. This is what a node saves for backward."""
    bias: Tensor | None
    out_features: int
    dense: Dense | None = None
    """How the codes become W; None for a dense weight."""

    def weight(self, stored: Tensor, dtype: torch.dtype) -> Tensor:
        """Return the dense W [O, I] from `stored`, in `dtype`."""
        return stored if self.dense is None else self.dense(stored, dtype)

    def output(self, x: Tensor) -> Tensor:
        """Compute the layer. x: [..., I] -> [..., O].

        The result is a new contiguous tensor: updates are added to it in place, and models change views of it in place.
        """
        # The output outlives the dense weight. Made before it, it leaves no hole in the heap of a CPU when that is freed.
        out = x.new_empty((*x.shape[:-1], self.out_features))
        weight = self.weight(self.stored, x.dtype)
        if self.bias is None:
            torch.mm(as_matrix(x), weight.t(), out=as_matrix(out))
        else:
            torch.addmm(self.bias, as_matrix(x), weight.t(), out=as_matrix(out))
        return out

    def without_gradients(self, x: Tensor) -> Tensor:
        """Compute the layer outside of any node. The result is contiguous too."""
        return F.linear(x, self.weight(self.stored, x.dtype), self.bias).contiguous()


def frozen_linear(host: nn.Module, x: Tensor) -> FrozenLinear | None:
    """Return the layer for a node that replaces its forward, or None if it must keep its own.

    The weight and bias must be frozen, on the device of x and in its dtype.
    """
    # Under autocast, and for tensor subclasses, the layer's own forward does more than a product.
    plain = type(x) is Tensor and not x.is_meta and not torch.is_autocast_enabled(x.device.type)
    if not plain or "forward" in host.__dict__:  # accelerate and others put a forward of their own on the instance
        return None
    weight, bias = host._parameters.get("weight"), host._parameters.get("bias")
    if bias is not None and not (_frozen_on(bias, x) and type(bias) is nn.Parameter and bias.dtype == x.dtype):
        return None
    if is_packed(host):
        return _packed(host, weight, bias, x)
    if (
        type(weight) is nn.Parameter
        and plain_class(host) is nn.Linear
        and _frozen_on(weight, x)
        and weight.dtype == x.dtype
    ):
        return FrozenLinear(weight, bias, weight.shape[0])
    return None


def _frozen_on(parameter: Tensor, x: Tensor) -> bool:
    """Whether a parameter is frozen and on the device of x."""
    return not parameter.requires_grad and parameter.device == x.device


def is_packed(host: nn.Module) -> bool:
    """Whether a layer holds its weight in few bits and computes with the dense one, so that it can be one node with its updates."""
    return is_four_bit(host) or is_eight_bit(host) and hasattr(host, "computes_in")


def _packed(host: nn.Module, weight: Any, bias: Tensor | None, x: Tensor) -> FrozenLinear | None:
    """Return a quantised layer for a node, or None if it must keep its own forward."""
    if x.dtype not in (torch.float32, torch.bfloat16, torch.float16) or not _frozen_on(weight, x):
        return None
    if is_four_bit(host) and not (torch.is_grad_enabled() and host.compute_dtype in (None, x.dtype)):
        return None
    found = packed_weight(host)
    return None if found is None else FrozenLinear(found.stored, bias, int(host.out_features), found.dense)  # pyright: ignore

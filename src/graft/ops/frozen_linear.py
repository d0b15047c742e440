"""A frozen linear layer that our autograd nodes compute with: its weight in the dtype of the input, dense or dequantised at each use.

Supported are plain `nn.Linear` layers, and the 4-bit layers of bitsandbytes while gradients are recorded. Without gradients the 4-bit
layers keep their own forward, which has kernels for few tokens. The 8-bit layers always keep it: they round the input too, which no dense
weight can express.

Legend: I input features, O output features, N tokens.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from graft.architectures.four_bit import is_four_bit, packed_for_inference, quant_state_of
from graft.ops.low_rank_update import as_matrix


@dataclass(frozen=True, eq=False)
class FrozenLinear:
    """A frozen layer x W^T + b."""

    stored: Tensor
    """W [O, I], or the codes that bitsandbytes stores for it. This is what a node saves for backward."""
    bias: Tensor | None
    out_features: int
    state: Any = None
    """The `QuantState` with which bitsandbytes dequantises the codes; None for a dense weight."""

    def weight(self, stored: Tensor, dtype: torch.dtype) -> Tensor:
        """Return the dense W [O, I] from `stored`, in `dtype`."""
        if self.state is None:
            return stored
        from bitsandbytes.functional import dequantize_4bit  # pyright: ignore[reportMissingImports]

        state = copy.copy(self.state)
        # Dequantise straight to the input's dtype, as the layer's own forward does, and not to the dtype before quantisation.
        state.dtype = dtype
        return dequantize_4bit(stored.view(-1, 1), state)

    def output(self, x: Tensor) -> Tensor:
        """Compute the layer. x: [..., I] -> [..., O].

        The result is a new contiguous tensor: updates are added to it in place, and models change views of it in place.
        """
        weight, out = self.weight(self.stored, x.dtype), x.new_empty((*x.shape[:-1], self.out_features))
        if self.bias is None:
            torch.mm(as_matrix(x), weight.t(), out=as_matrix(out))
        else:
            torch.addmm(self.bias, as_matrix(x), weight.t(), out=as_matrix(out))
        return out


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
    if is_four_bit(host):
        return _four_bit(host, weight, bias, x)
    cls = getattr(type(host), "graft_base", type(host))
    if type(weight) is nn.Parameter and cls is nn.Linear and _frozen_on(weight, x) and weight.dtype == x.dtype:
        return FrozenLinear(weight, bias, weight.shape[0])
    return None


def _frozen_on(parameter: Tensor, x: Tensor) -> bool:
    """Whether a parameter is frozen and on the device of x."""
    return not parameter.requires_grad and parameter.device == x.device


def _four_bit(host: nn.Module, weight: Any, bias: Tensor | None, x: Tensor) -> FrozenLinear | None:
    """Return a 4-bit layer of bitsandbytes for a node, or None if it must keep its own forward."""
    state: Any = quant_state_of(host)
    if state is None or tuple(state.shape) != (host.out_features, host.in_features) or packed_for_inference(host):
        return None
    supported = x.dtype in (torch.float32, torch.bfloat16, torch.float16) and host.compute_dtype in (None, x.dtype)
    if not (supported and _frozen_on(weight, x) and torch.is_grad_enabled()):
        return None
    return FrozenLinear(weight.data, bias, state.shape[0], state)

"""A frozen linear layer as a node of ours computes with it: its weight in the dtype of the input, dense or dequantised for each use.

`nn.Linear` as it is, and bitsandbytes' 4-bit layers while gradients are recorded. Without gradients those keep their own forward, which has
kernels for few tokens; their 8-bit layers keep it always, since it rounds the input too and no dense weight says that.

Legend: I input features, O output features, N tokens.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from graft.architectures.four_bit import is_four_bit, packed_for_inference
from graft.ops.low_rank import flat


@dataclass(frozen=True, eq=False)
class FrozenLinear:
    """x W^T + b."""

    stored: Tensor
    """W [O, I], or the codes that bitsandbytes keeps of it. A node saves this for backward."""
    bias: Tensor | None
    out_features: int
    state: Any = None
    """What bitsandbytes reads the codes by."""

    def weight(self, stored: Tensor, dtype: torch.dtype) -> Tensor:
        """W [O, I] of what was stored."""
        if self.state is None:
            return stored
        from bitsandbytes.functional import dequantize_4bit  # pyright: ignore[reportMissingImports]

        state = copy.copy(self.state)
        state.dtype = dtype  # as the layer's own forward: not by way of the dtype that it was quantised from
        return dequantize_4bit(stored.view(-1, 1), state)

    def output(self, x: Tensor) -> Tensor:
        """[..., I] -> [..., O], a contiguous tensor of its own: terms are added in place, and models change views of it in place."""
        weight, out = self.weight(self.stored, x.dtype), x.new_empty((*x.shape[:-1], self.out_features))
        if self.bias is None:
            torch.mm(flat(x), weight.t(), out=flat(out))
        else:
            torch.addmm(self.bias, flat(x), weight.t(), out=flat(out))
        return out


def frozen_linear(host: nn.Module, x: Tensor) -> FrozenLinear | None:
    """The layer as a node computes with it in place of the layer's own forward: frozen, here, in x's dtype. None where that is not so."""
    plain = type(x) is Tensor and not x.is_meta and not torch.is_autocast_enabled(x.device.type)
    if not plain or "forward" in host.__dict__:
        return None
    weight, bias = host._parameters.get("weight"), host._parameters.get("bias")
    if bias is not None and not (_frozen_here(bias, x) and type(bias) is nn.Parameter and bias.dtype == x.dtype):
        return None
    if is_four_bit(host):
        return _four_bit(host, weight, bias, x)
    own = getattr(type(host), "graft_base", type(host))
    if type(weight) is nn.Parameter and own is nn.Linear and _frozen_here(weight, x) and weight.dtype == x.dtype:
        return FrozenLinear(weight, bias, weight.shape[0])
    return None


def _frozen_here(parameter: Tensor, x: Tensor) -> bool:
    return not parameter.requires_grad and parameter.device == x.device


def _four_bit(host: nn.Module, weight: Any, bias: Tensor | None, x: Tensor) -> FrozenLinear | None:
    state: Any = getattr(weight, "quant_state", None)
    if state is None or tuple(state.shape) != (host.out_features, host.in_features) or packed_for_inference(host):
        return None
    dtype = x.dtype in (torch.float32, torch.bfloat16, torch.float16) and host.compute_dtype in (None, x.dtype)
    if not (dtype and _frozen_here(weight, x) and torch.is_grad_enabled()):
        return None
    return FrozenLinear(weight.data, bias, state.shape[0], state)

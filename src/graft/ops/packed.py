"""Weights that are stored in few bits, and the dense matrices that their layers compute with.

One entry for each library says which layers are its own, what they store, and how that becomes numbers:

    bitsandbytes, 4 bits    codes of 4 bits, a scale for each block of 64 (Dettmers et al. 2023, arXiv 2305.14314)
    bitsandbytes, 8 bits    whole numbers from -127 to 127, a scale for each row (Dettmers et al. 2022, arXiv 2208.07339)
    torchao                 a tensor of a class of its own, which knows how to dequantise itself
    float8 of transformers  floats of 8 bits, a scale for each tile of the weight (DeepSeek-V3, FP8 checkpoints)

Layers of other libraries (GPTQ, AWQ) keep their weight to themselves: kinds that only call the layer work on them.

Legend: I input features, O output features.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn import functional as F

from graft.architectures.eight_bit import is_eight_bit, scales_of
from graft.architectures.four_bit import is_four_bit, packed_for_inference, quant_state_of
from graft.architectures.torchao import is_torchao

Dense = Callable[[Tensor, torch.dtype], Tensor]
"""Turns what a layer stores into its weight [O, I] in a dtype."""


@dataclass(frozen=True, eq=False)
class PackedWeight:
    """The weight of a quantised layer."""

    stored: Tensor
    """What the layer holds. It is all that a node keeps for backward."""
    dense: Dense
    dtype: torch.dtype
    """The dtype in which the layer computes."""


def packed_weight(module: nn.Module) -> PackedWeight | None:
    """Return the weight of a quantised linear layer, None for other layers and for those that cannot be dequantised."""
    for entry in _ENTRIES:
        if (found := entry(module)) is not None:
            return found
    return None


def dequantised(module: nn.Module, dtype: torch.dtype | None = None) -> Tensor | None:
    """Return the weight [O, I] of a quantised linear layer as numbers, in the dtype in which the layer computes or in another one.

    It is made anew at each call, since keeping it would cost what quantising saved. None if the layer cannot be dequantised.
    """
    found = packed_weight(module)
    if found is None:
        return None
    stored = found.stored.detach()
    whole = stored.full_tensor() if isinstance(stored, DTensor) else stored  # a base in parts, read between passes
    return found.dense(whole, dtype or found.dtype)


def _four_bits(module: nn.Module) -> PackedWeight | None:
    held: Any = module
    if not is_four_bit(module) or packed_for_inference(module):
        return None
    state = quant_state_of(module)
    if state is None or tuple(state.shape) != (held.out_features, held.in_features):
        return None

    def dense(stored: Tensor, dtype: torch.dtype) -> Tensor:
        from bitsandbytes.functional import dequantize_4bit  # pyright: ignore[reportMissingImports]

        # Straight to the input's dtype, as the layer's own forward does, and not to the dtype before quantisation.
        own = copy.copy(state)
        own.dtype = dtype
        return dequantize_4bit(stored.view(-1, 1), own)

    return PackedWeight(held.weight.data, dense, held.compute_dtype or state.dtype)


def _eight_bits(module: nn.Module) -> PackedWeight | None:
    if not is_eight_bit(module) or (scales := scales_of(module)) is None:
        return None
    held: Any = module

    def dense(stored: Tensor, dtype: torch.dtype) -> Tensor:
        return stored.to(dtype).mul_(scales.unsqueeze(1) / 127)

    return PackedWeight(held.weight.data, dense, getattr(held, "computes_in", torch.float32))


def _torchao(module: nn.Module) -> PackedWeight | None:
    weight: Any = module._parameters.get("weight")
    if not is_torchao(weight) or not hasattr(weight, "dequantize"):
        return None
    return PackedWeight(weight.data, lambda stored, dtype: stored.dequantize().to(dtype), weight.dtype)


def _float8(module: nn.Module) -> PackedWeight | None:
    weight, scales = module._parameters.get("weight"), module._parameters.get("weight_scale_inv")
    if weight is None or scales is None or weight.dim() != 2 or weight.dtype != torch.float8_e4m3fn:
        return None
    tile = getattr(module, "block_size", None)

    def dense(stored: Tensor, dtype: torch.dtype) -> Tensor:
        spread = scales.float()
        if tile is not None:  # a scale for each tile; those at the edge may be smaller
            spread = spread.repeat_interleave(tile[0], 0)[: stored.shape[0]]
            spread = spread.repeat_interleave(tile[1], 1)[:, : stored.shape[1]]
        return (stored.float() * spread).to(dtype)

    return PackedWeight(weight.data, dense, torch.bfloat16)


_ENTRIES: tuple[Callable[[nn.Module], PackedWeight | None], ...] = (_four_bits, _eight_bits, _torchao, _float8)


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, stored: Tensor, dense: Dense, bias: Tensor | None) -> Tensor:
        ctx.dense = dense
        ctx.save_for_backward(stored)
        return F.linear(x, dense(stored, x.dtype), bias)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        (grad,), (stored,) = grads, ctx.saved_tensors
        grad_x = torch.matmul(grad, ctx.dense(stored, grad.dtype)) if ctx.needs_input_grad[0] else None
        return grad_x, None, None, grad.flatten(0, -2).sum(0) if ctx.needs_input_grad[3] else None


def packed_product(x: Tensor, weight: PackedWeight, bias: Tensor | None = None, rows: Any = None) -> Tensor:
    """Return x W^T + b, or only its output features `rows`. x: [..., I] -> [..., O].

    Backward dequantises again: no dense weight is kept.
    """
    whole = weight.dense
    dense = whole if rows is None else lambda stored, dtype: whole(stored, dtype)[rows]
    return _Product.apply(x, weight.stored, dense, bias)  # pyright: ignore

"""Rotary positions by one kernel: q' = q cos + (-q_2, q_1) sin for the halves q = (q_1, q_2) of each head, and k' likewise.

A family's attention looks up `apply_rotary_pos_emb` among the names of its model file. Changing it there would change every model of
the process; so an attention module gets a forward that is its own code with its own names, but for that one.

Liger's kernel rotates where its arguments lie. Both directions give it copies: q may be the output of a layer that somebody else holds,
and a gradient may be another node's too.

Su et al. 2021, "RoFormer" (arXiv 2104.09864), in the half-rotation form of GPT-NeoX and LLaMA.

Legend: B rows, H heads, L length, D features of a head.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from graft.injection.substitution import own_class, register_mixin
from graft.kernels.liger import Kernels
from graft.kernels.norms import FOREIGN

NAME = "apply_rotary_pos_emb"
Rotation = Callable[..., Any]


@register_mixin
class RotatesByKernel:
    """Mixin of an attention module: its own forward, with another rotation among its names."""

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():
            return super().forward(*args, **kwargs)  # pyright: ignore
        return self.__dict__["graft_rotary"](self, *args, **kwargs)


def serve_rotation(module: nn.Module, kernels: Kernels) -> bool:
    """Let the kernel rotate a module's queries and keys, if its forward does so in the way of the kernel; whether it does."""
    forward = own_class(module).forward
    if not isinstance(forward, types.FunctionType) or NAME not in forward.__code__.co_names:
        return False
    own = forward.__globals__.get(NAME)
    if not isinstance(own, types.FunctionType) or not rotates_halves(own):
        return False
    names = {**forward.__globals__, NAME: _rotation(own, kernels)}
    copy = types.FunctionType(forward.__code__, names, forward.__name__, forward.__defaults__, forward.__closure__)
    copy.__kwdefaults__ = forward.__kwdefaults__
    module.__dict__["graft_rotary"] = copy
    return True


@functools.cache
def rotates_halves(function: Rotation) -> bool:
    """Whether a function of (q, k, cos, sin) is the half rotation, in float32 and, with the same rounding, in bfloat16."""
    draw = torch.Generator().manual_seed(0)
    q_BHLD, k_BHLD = (torch.randn(2, heads, 5, 8, generator=draw) for heads in (4, 2))
    angles = torch.randn(2, 5, 4, generator=draw).repeat(1, 1, 2)
    inputs = (q_BHLD, k_BHLD, angles.cos(), angles.sin())
    for dtype in (torch.float32, torch.bfloat16):
        q, k, cos, sin = (each.to(dtype) for each in inputs)
        try:
            found = function(q, k, cos, sin)
        except FOREIGN:
            return False
        wanted = [_rotated(each, cos, sin) for each in (q, k)]
        if not (isinstance(found, tuple) and len(found) == 2):
            return False
        if not all(isinstance(one, Tensor) and torch.equal(one, two) for one, two in zip(found, wanted, strict=True)):
            return False
    return True


def _rotated(x_BHLD: Tensor, cos_BLD: Tensor, sin_BLD: Tensor) -> Tensor:
    first, second = x_BHLD.chunk(2, -1)
    return x_BHLD * cos_BLD.unsqueeze(1) + torch.cat([-second, first], -1) * sin_BLD.unsqueeze(1)


def _rotation(own: Rotation, kernels: Kernels) -> Rotation:
    """The kernel for what it is made for, the family's own function for all else."""

    @functools.wraps(own)
    def rotation(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *args: Any, **kwargs: Any) -> Any:
        if args or kwargs or not kernels.take(q, k, cos, sin) or not _fit(q, k, cos, sin):
            return own(q, k, cos, sin, *args, **kwargs)
        return _Rotate.apply(q, k, cos, sin, kernels)

    return rotation


def _fit(q_BHLD: Tensor, k_BHLD: Tensor, cos: Tensor, sin: Tensor) -> bool:
    """Whether whole heads are rotated, by angles of one for each row or for all."""
    if not (q_BHLD.dim() == k_BHLD.dim() == 4 and cos.dim() == 3 and cos.shape == sin.shape):
        return False
    rows, _, length, width = q_BHLD.shape
    same = (k_BHLD.shape[0], *k_BHLD.shape[2:]) == (rows, length, width)
    return same and cos.shape[0] in (1, rows) and cos.shape[1:] == (length, width) and width % 2 == 0


class _Rotate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, kernels: Kernels) -> tuple[Tensor, ...]:
        ctx.save_for_backward(cos, sin)
        ctx.kernels = kernels
        return _in_one_row(kernels.rotate_, q, k, cos, sin)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return *_in_one_row(ctx.kernels.rotate_back_, *grads, *ctx.saved_tensors), None, None, None


def _in_one_row(
    rotate_: Callable[..., tuple[Tensor, Tensor]], q_BHLD: Tensor, k_BHLD: Tensor, cos: Tensor, sin: Tensor
) -> tuple[Tensor, ...]:
    """Rotate copies, with all rows end to end: the kernel is compiled anew for each number of rows."""
    rows, _, length, width = q_BHLD.shape
    angles = (each.expand(rows, length, width).reshape(1, rows * length, width) for each in (cos, sin))
    copies = (each.transpose(1, 2).clone(memory_format=torch.contiguous_format) for each in (q_BHLD, k_BHLD))
    found = rotate_(*(each.view(1, rows * length, -1, width).transpose(1, 2) for each in copies), *angles)
    return tuple(each.transpose(1, 2).reshape(rows, length, -1, width).transpose(1, 2) for each in found)

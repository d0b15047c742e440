"""Compute rotary positions by one kernel: q' = q cos + (-q_2, q_1) sin for the halves q = (q_1, q_2) of each head, and the same for k.

An attention module gets a copy of its forward that calls this kernel instead of its model file's `apply_rotary_pos_emb`
(`injection/forward_copy.py`), so no other model is affected.

Liger's kernel overwrites its arguments. Forward and backward give it copies, because somebody else may hold q (as the output of a layer)
or a gradient (as another node's).

Su et al. 2021, "RoFormer" (arXiv 2104.09864), in the half-rotation form of GPT-NeoX and LLaMA.

Legend: B rows, H heads, L length, D features of a head.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from graft.architectures.walk import own_class
from graft.injection.forward_copy import global_function, with_globals
from graft.injection.substitution import register_mixin
from graft.kernels.liger import Kernels
from graft.kernels.norms import FORWARD_ERRORS

NAME = "apply_rotary_pos_emb"
Rotation = Callable[..., Any]


@register_mixin
class RotatesByKernel:
    """Mixin for an attention module: runs its own forward with another rotation."""

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():
            return super().forward(*args, **kwargs)  # pyright: ignore
        return self.__dict__["graft_rotary"](self, *args, **kwargs)


def serve_rotation(module: nn.Module, kernels: Kernels) -> bool:
    """Let the kernel rotate a module's queries and keys, if its forward rotates as the kernel does. Return whether it does."""
    forward: Any = own_class(module).forward
    own = global_function(forward, NAME)
    if own is None or not rotates_halves(own):
        return False
    module.__dict__["graft_rotary"] = with_globals(forward, {NAME: _rotation(own, kernels)})
    return True


@functools.cache
def rotates_halves(function: Rotation) -> bool:
    """Whether a function of (q, k, cos, sin) is the half rotation, bit for bit, in float32 and in bfloat16."""
    draw = torch.Generator().manual_seed(0)
    q_BHLD, k_BHLD = (torch.randn(2, heads, 5, 8, generator=draw) for heads in (4, 2))
    angles = torch.randn(2, 5, 4, generator=draw).repeat(1, 1, 2)
    inputs = (q_BHLD, k_BHLD, angles.cos(), angles.sin())
    for dtype in (torch.float32, torch.bfloat16):
        q, k, cos, sin = (each.to(dtype) for each in inputs)
        try:
            found = function(q, k, cos, sin)
        except FORWARD_ERRORS:
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
    """Return a rotation that uses the kernel where it can, and the family's own function for everything else."""

    @functools.wraps(own)
    def rotation(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *args: Any, **kwargs: Any) -> Any:
        if args or kwargs or not kernels.accepts(q, k, cos, sin) or not _fit(q, k, cos, sin):
            return own(q, k, cos, sin, *args, **kwargs)
        return _Rotate.apply(q, k, cos, sin, kernels)

    return rotation


def _fit(q_BHLD: Tensor, k_BHLD: Tensor, cos: Tensor, sin: Tensor) -> bool:
    """Whether the angles rotate whole heads, and there is one set of them per row or one for all rows."""
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
    """Rotate copies, with all rows laid end to end as one, because the kernel is compiled anew for each number of rows.

    E.g. q [4, 8, 100, 64] becomes [1, 8, 400, 64], with the angles of each row repeated alongside.
    """
    rows, _, length, width = q_BHLD.shape
    angles = (each.expand(rows, length, width).reshape(1, rows * length, width) for each in (cos, sin))
    copies = (each.transpose(1, 2).clone(memory_format=torch.contiguous_format) for each in (q_BHLD, k_BHLD))
    found = rotate_(*(each.view(1, rows * length, -1, width).transpose(1, 2) for each in copies), *angles)
    return tuple(each.transpose(1, 2).reshape(rows, length, -1, width).transpose(1, 2) for each in found)

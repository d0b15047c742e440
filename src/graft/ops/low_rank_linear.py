"""A frozen linear layer and its LoRAs as one autograd node: x W^T + b + s B A dropout(x).

With G the gradient of the output and T = s G B, the gradient of the input is G W + M (T A): the second product is added into what the
first has made, where two nodes would make a tensor each and autograd a sum of them. Layers that read the same x (q, k and v; gate and up)
go on in the same way: `as_read` gives them x behind a node of its own, and each adds its part into one tensor that this node hands
on. Ye et al. 2023, "mLoRA" (arXiv 2312.02515).

Which layers: `frozen_layer.py`. Every other one keeps its own forward, and its low-rank part is a node by itself (`fused.py`).

Legend: I input features, O output features, N tokens.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from graft.ops.frozen_linear import FrozenLinear, frozen_linear
from graft.ops.low_rank import LowRankUpdate, add_terms_, factor_gradients, factors_of, flat, one_node


def linear_low_rank(host: nn.Module, x: Tensor, updates: Sequence[LowRankUpdate]) -> Tensor | None:
    """The layer's output with every term added to its rows; None where layer and terms cannot be one node. x: [..., I] -> [..., O].

    The gradient is not differentiable again.
    """
    layer = frozen_linear(host, x) if one_node(updates, x.device) else None
    if layer is None:
        return None
    x, gradient = as_read(x)
    return _LinearLowRank.apply(x, layer, updates, gradient, *factors_of(updates))  # pyright: ignore


class _LinearLowRank(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, layer: FrozenLinear, updates: Sequence[LowRankUpdate], gradient: InputGradient | None,
        *factors: Tensor,
    ) -> Tensor:  # fmt: skip
        out = layer.output(x)
        lows = add_terms_(out, x, updates)
        ctx.layer, ctx.updates, ctx.gradient = layer, updates, gradient
        ctx.save_for_backward(x, layer.stored, *lows, *factors)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Any:
        (grad,), (x, stored, *saved) = grads, ctx.saved_tensors
        grad_x = None
        if ctx.gradient is not None:
            grad_x = ctx.gradient.add(flat(grad), ctx.layer.weight(stored, x.dtype), x.shape)
        made = factor_gradients(ctx.updates, grad, x, saved, ctx.needs_input_grad[4:], grad_x, fresh=False)
        return None, None, None, None, *made  # the gradient of x lies where `_Read` finds it


class InputGradient:
    """The gradient of one x, which the layers that read it add up in one tensor for each backward pass."""

    def __init__(self) -> None:
        self._sums: dict[int, Tensor] = {}
        """By backward pass: one that never comes to x, or fails on its way, leaves its sum to no other."""

    def add(self, grad_NO: Tensor, weight: Tensor, shape: torch.Size) -> Tensor:
        """Add G W; the sum so far, in x's shape, to add more to."""
        number = torch._C._current_graph_task_id()
        total = self._sums.get(number)
        if total is None:
            total = self._sums[number] = torch.mm(grad_NO, weight).view(shape)
        else:
            total.view(-1, shape[-1]).addmm_(grad_NO, weight)
        return total

    def take(self) -> Tensor | None:
        """What was added in the backward pass at hand."""
        return self._sums.pop(torch._C._current_graph_task_id(), None)


class _Read(torch.autograd.Function):
    """x as linear layers read it; hands on their `InputGradient`. Autograd runs it when all of them have run."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, gradient: InputGradient) -> Tensor:
        ctx.set_materialize_grads(False)
        ctx.gradient = gradient
        return x.detach()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        return ctx.gradient.take(), None


class _Latest(threading.local):
    """The x that was read last, weakly: the layers that share it come one after another."""

    given: weakref.ref[Tensor] | None = None
    version = 0
    stream: Any = None
    read: tuple[Tensor, InputGradient] | None = None

    def forget(self, reference: weakref.ref[Tensor]) -> None:
        if self.given is reference:
            self.given = self.read = None


_latest = _Latest()


def as_read(x: Tensor) -> tuple[Tensor, InputGradient | None]:
    """x behind a node that is the same for all layers that read it, as it is now and on one stream; x itself where it needs no gradient."""
    if not (x.requires_grad and torch.is_grad_enabled()):
        return x, None
    stream = torch.cuda.current_stream(x.device) if x.is_cuda else None
    same = _latest.given is not None and _latest.given() is x
    if same and _latest.read is not None and (_latest.version, _latest.stream) == (x._version, stream):
        return _latest.read
    gradient = InputGradient()
    read: tuple[Tensor, InputGradient] = (_Read.apply(x, gradient), gradient)  # pyright: ignore
    _latest.given, _latest.read = weakref.ref(x, _latest.forget), read
    _latest.version, _latest.stream = x._version, stream
    return read

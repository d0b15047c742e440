"""A frozen linear layer and its low-rank updates as one autograd node: x W^T + b + s B A dropout(x).

With the gradient G of the output and T = s G B, the gradient of the input is G W + M (T A). The node adds the second product into the
tensor that holds the first, where two nodes would make a tensor each and autograd a third one for their sum.

Layers that read the same x (q, k and v; gate and up) continue in that tensor. `shared_input` hands all of them the same x from one node,
each adds its part to one `InputGradient`, and the node returns the total when all of them have run:

    forward     q, k and v call shared_input(x): q makes the node, k and v get the same one
    backward    v:  total  = G_v W_v,  total += M_v (T_v A_v)
                k:  total += G_k W_k,  total += M_k (T_k A_k)
                q:  total += G_q W_q,  total += M_q (T_q A_q)
                the node of x returns `total`; q, k and v themselves return None for x

Ye et al. 2023, "mLoRA" (arXiv 2312.02515).

`frozen_linear.py` says which layers can be part of the node. Every other layer keeps its own forward, and `low_rank.py` adds its updates.

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

from graft.architectures.torch_internals import backward_pass_number
from graft.ops.frozen_linear import FrozenLinear, frozen_linear
from graft.ops.low_rank import Update, add_updates_, factor_gradients, factors_of, one_node
from graft.ops.low_rank_update import as_matrix


def linear_low_rank(host: nn.Module, x: Tensor, updates: Sequence[Update]) -> Tensor | None:
    """Return the layer's output with every update added to its rows, or None if they cannot be one node. x: [..., I] -> [..., O].

    The gradient cannot be differentiated again.
    """
    layer = frozen_linear(host, x) if one_node(updates, x.device) else None
    if layer is None:
        return None
    if not torch.is_grad_enabled():  # no node: its call costs much beside the products of one token
        out = layer.without_gradients(x)
        add_updates_(out, x, updates)
        return out
    x, input_gradient = shared_input(x)
    return _LinearLowRank.apply(x, layer, updates, input_gradient, *factors_of(updates))  # pyright: ignore


class _LinearLowRank(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, layer: FrozenLinear, updates: Sequence[Update],
        input_gradient: InputGradient | None, *factors: Tensor,
    ) -> Tensor:  # fmt: skip
        out = layer.output(x)
        lows = add_updates_(out, x, updates)
        ctx.layer, ctx.updates, ctx.input_gradient = layer, updates, input_gradient
        # Of a 4-bit layer `stored` is the codes: the dense weight is dequantised again in backward and never kept.
        ctx.save_for_backward(x, layer.stored, *lows, *factors)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Any:
        (grad,), (x, stored, *saved) = grads, ctx.saved_tensors
        grad_x = None
        if ctx.input_gradient is not None:
            grad_x = ctx.input_gradient.add(as_matrix(grad), ctx.layer.weight(stored, x.dtype), x.shape)
        # Inputs 0 to 3 are x, layer, updates and input_gradient; the factors follow.
        factor_grads = factor_gradients(ctx.updates, grad, x, saved, ctx.needs_input_grad[4:], grad_x, overwrite=False)
        return None, None, None, None, *factor_grads  # `_SharedInput` returns the gradient of x


class InputGradient:
    """The gradient of one x. In each backward pass the layers that read x add their parts to one tensor."""

    def __init__(self) -> None:
        self._totals: dict[int, Tensor] = {}
        """By the number of the backward pass, so that a pass which fails or never reaches x leaves nothing to a later one."""

    def add(self, grad_NO: Tensor, weight: Tensor, shape: torch.Size) -> Tensor:
        """Add G W, and return the total in x's shape, to which the caller adds its low-rank part in place."""
        number = backward_pass_number()
        total = self._totals.get(number)
        if total is None:
            total = self._totals[number] = torch.mm(grad_NO, weight).view(shape)
        else:
            total.view(-1, shape[-1]).addmm_(grad_NO, weight)
        return total

    def take(self) -> Tensor | None:
        """Remove and return the total of the current backward pass; None if no layer added to it."""
        return self._totals.pop(backward_pass_number(), None)


class _SharedInput(torch.autograd.Function):
    """Hand x on unchanged. Autograd runs the backward after that of every layer that reads the result, so their total is complete."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, input_gradient: InputGradient) -> Tensor:
        ctx.set_materialize_grads(False)  # the layers return None: autograd need not make zeros of x's size for it
        ctx.input_gradient = input_gradient
        return x.detach()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        return ctx.input_gradient.take(), None


class _LastInput(threading.local):
    """The x that `shared_input` saw last in this thread, held weakly. Layers that share an x run one after another."""

    given: weakref.ref[Tensor] | None = None
    version = 0
    stream: Any = None
    shared: tuple[Tensor, InputGradient] | None = None

    def forget(self, reference: weakref.ref[Tensor]) -> None:
        if self.given is reference:
            self.given = self.shared = None


_last = _LastInput()


def shared_input(x: Tensor) -> tuple[Tensor, InputGradient | None]:
    """Return x from a node that all layers reading it share, with its `InputGradient`. If x needs no gradient, return x and None.

    A node is shared only while x has not been changed in place and the CUDA stream is the same.
    """
    if not (x.requires_grad and torch.is_grad_enabled()):
        return x, None
    stream = torch.cuda.current_stream(x.device) if x.is_cuda else None
    same = _last.given is not None and _last.given() is x
    if same and _last.shared is not None and (_last.version, _last.stream) == (x._version, stream):
        return _last.shared
    input_gradient = InputGradient()
    shared: tuple[Tensor, InputGradient] = (_SharedInput.apply(x, input_gradient), input_gradient)  # pyright: ignore
    _last.given, _last.shared = weakref.ref(x, _last.forget), shared
    _last.version, _last.stream = x._version, stream
    return shared

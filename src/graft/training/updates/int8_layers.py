"""Layers that compute with a weight in 8 bits: it is dequantised for each pass, and its gradient goes to a sink as soon as it exists.

A linear layer keeps its input for backward and nothing of the weight. Autograd does not own the gradient of a weight: the layer's
parameter is empty and stands in the graph only so that outputs require gradients.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

from graft.injection.substitution import register_mixin, substitute
from graft.training.updates.int8 import Int8Weight

WEIGHT = "graft_int8"
"""The attribute in which a layer keeps its `Held`."""


class Held:
    """A weight in 8 bits, and where its gradients go."""

    def __init__(self, weight: Int8Weight, anchor: nn.Parameter) -> None:
        self.weight, self.anchor = weight, anchor
        self.sink: Callable[[Held, Tensor], None] | None = None
        """Takes the gradient [R, C] of one use of the weight, in backward."""

    def take(self, grad_RC: Tensor) -> None:
        """Hand a gradient on."""
        assert self.sink is not None
        self.sink(self, grad_RC)


class _Linear(torch.autograd.Function):
    """y = x W', where W' is W [O, I] transposed, or x W for a weight that is stored as [I, O]."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, anchor: Tensor, held: Held, turned: bool) -> Tensor:
        ctx.save_for_backward(x)
        ctx.held, ctx.turned = held, turned
        return _product(x, held.weight.dequantised().to(x.dtype), turned)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, None, None, None]:  # type: ignore[override]
        (x,), held = ctx.saved_tensors, ctx.held
        weight = held.weight.dequantised().to(grad.dtype) if ctx.needs_input_grad[0] else None
        grad_x = None if weight is None else _product(grad, weight, not ctx.turned)
        del weight  # before the gradient of the weight takes as much
        x_NI, grad_NO = x.flatten(0, -2), grad.flatten(0, -2)
        held.take((x_NI.T @ grad_NO if ctx.turned else grad_NO.T @ x_NI).float())
        return grad_x, None, None, None


def _product(x: Tensor, weight: Tensor, turned: bool) -> Tensor:
    return x @ weight if turned else F.linear(x, weight)


class _Embedding(torch.autograd.Function):
    """The rows of a table [V, D] for some token ids."""

    @staticmethod
    def forward(ctx: Any, ids: Tensor, anchor: Tensor, held: Held, padding: int | None) -> Tensor:
        ctx.save_for_backward(ids)
        ctx.held, ctx.padding = held, padding
        return held.weight.rows(ids.flatten()).to(held.weight.dtype).view(*ids.shape, -1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, None, None, None]:  # type: ignore[override]
        (ids,), held = ctx.saved_tensors, ctx.held
        table = torch.zeros(held.weight.shape, device=grad.device)
        table.index_add_(0, ids.flatten(), grad.flatten(0, -2).float())
        if ctx.padding is not None:
            table[ctx.padding] = 0.0
        held.take(table)
        return None, None, None, None


@register_mixin
class Int8Linear:
    """Mixin for a linear layer (or transformers' Conv1D, whose weight is stored transposed) with a weight in 8 bits."""

    def forward(self: Any, x: Tensor) -> Tensor:
        held: Held = self.__dict__[WEIGHT]
        out: Any = _Linear.apply(x, held.anchor, held, isinstance(self, Conv1D))
        return out if self.bias is None else out + self.bias


@register_mixin
class Int8Embedding:
    """Mixin for an embedding with a table in 8 bits."""

    def forward(self: Any, input: Tensor) -> Tensor:
        held: Held = self.__dict__[WEIGHT]
        out: Any = _Embedding.apply(input, held.anchor, held, self.padding_idx)
        return out


PLAIN: dict[Callable[..., Any], type] = {
    nn.Linear.forward: Int8Linear, Conv1D.forward: Int8Linear, nn.Embedding.forward: Int8Embedding,
}  # fmt: skip
"""Forwards that a mixin replaces. Layers that compute something else with their weight keep it in floating point."""


def hold_in_int8(
    model: nn.Module, parameters: dict[str, nn.Parameter], make: Callable[[Tensor], Int8Weight]
) -> dict[str, Held]:
    """Replace the given matrices of a model by weights in 8 bits; returns them by the parameter's name.

    Those that only plain linear layers and embeddings use are replaced, also where two modules share one. Their parameters become empty.
    """
    users: dict[int, list[nn.Module]] = {}
    for module in model.modules():
        for parameter in module._parameters.values():
            if parameter is not None:
                users.setdefault(id(parameter), []).append(module)
    found: dict[str, Held] = {}
    for name, parameter in parameters.items():
        own = users[id(parameter)]
        plain = all(type(each).forward in PLAIN and each._parameters.get("weight") is parameter for each in own)
        if parameter.dim() != 2 or not plain or any("forward" in each.__dict__ for each in own):
            continue
        held = found[name] = Held(make(parameter.data), parameter)
        held.weight.uses = len(own)
        parameter.data = parameter.data.new_empty(0)
        for module in own:
            mixin = PLAIN[type(module).forward]
            module.__dict__[WEIGHT] = held
            substitute(module, mixin)
    return found

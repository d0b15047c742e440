"""The product in the middle of a gated MLP, h = act(e) * u, with its gradients, and as one autograd node that saves only e and u.

    de = dh * u * act'(e)        du = dh * act(e)

Autograd by itself also saves act(e). The activations are silu and gelu (exact or by tanh); act' is torch's own operator. Dauphin et
al. 2017 (arXiv 1612.08083); Shazeer 2020, "GLU variants improve transformer" (arXiv 2002.05202).

Legend: e output of the gate, u output of the layer beside it, F features of both.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

Activation = Literal["silu", "gelu", "gelu_tanh"]
SiluProduct = Callable[[Tensor, Tensor], Tensor | None]
"""A kernel that computes silu(e) * u, or returns None for tensors that it does not support."""
ACTIVATIONS: tuple[Activation, ...] = ("silu", "gelu", "gelu_tanh")


def activated(activation: Activation, e: Tensor) -> Tensor:
    """Compute act(e)."""
    return F.silu(e) if activation == "silu" else F.gelu(e, approximate=_approximation(activation))


def product(activation: Activation, e: Tensor, u: Tensor, silu: SiluProduct | None = None) -> Tensor:
    """Compute h = act(e) * u without autograd. e, u: [..., F] -> [..., F]."""
    if activation == "silu" and silu is not None and (h := silu(e, u)) is not None:
        return h
    return activated(activation, e).mul_(u)


def product_gradients(
    activation: Activation, e: Tensor, u: Tensor, dh: Tensor, overwrite: bool = False
) -> tuple[Tensor, Tensor]:
    """Return de and du. With `overwrite` dh's memory becomes de; e and u always stay as they are. All [..., F]."""
    du = activated(activation, e).mul_(dh)
    de = dh.mul_(u) if overwrite else dh * u  # after du, which reads dh too
    # The operators multiply their first argument by act'(e), and may write the result over it.
    if activation == "silu":
        torch.ops.aten.silu_backward.grad_input(de, e, grad_input=de)
    else:
        torch.ops.aten.gelu_backward.grad_input(de, e, approximate=_approximation(activation), grad_input=de)
    return de, du


def _approximation(activation: Activation) -> str:
    return "tanh" if activation == "gelu_tanh" else "none"


def gated_product(activation: Activation, e: Tensor, u: Tensor, silu: SiluProduct | None = None) -> Tensor:
    """Compute act(e) * u as one node. e, u: [..., F] -> [..., F]. The gradient cannot be differentiated again."""
    if e.dtype != u.dtype or e.shape != u.shape:  # layers of other code may differ; torch then promotes and broadcasts
        return activated(activation, e) * u
    return _GatedProduct.apply(activation, e, u, silu)  # pyright: ignore


class _GatedProduct(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, activation: Activation, e: Tensor, u: Tensor, silu: SiluProduct | None) -> Tensor:
        ctx.activation = activation
        ctx.save_for_backward(e, u)
        return product(activation, e, u, silu)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Any:
        # No `overwrite`: the gradient of the output belongs to autograd, and another branch may read it.
        return None, *product_gradients(ctx.activation, *ctx.saved_tensors, *grads), None

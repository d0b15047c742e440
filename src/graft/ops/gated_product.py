"""The product in the middle of a gated MLP, h = act(e) * u, and its gradients; also as one autograd node that keeps e and u alone.

    de = dh * u * act'(e)        du = dh * act(e)

Autograd's own way keeps act(e) besides. Activations: silu and gelu, exact or by tanh, with torch's own operators for act'. Dauphin et
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
"""silu(e) * u by a kernel; None where it does not take them."""
ACTIVATIONS: tuple[Activation, ...] = ("silu", "gelu", "gelu_tanh")


def activated(activation: Activation, e: Tensor) -> Tensor:
    """act(e)."""
    return F.silu(e) if activation == "silu" else F.gelu(e, approximate=_approximation(activation))


def product(activation: Activation, e: Tensor, u: Tensor, silu: SiluProduct | None = None) -> Tensor:
    """h = act(e) * u, without autograd. e, u: [..., F] -> [..., F]."""
    if activation == "silu" and silu is not None and (h := silu(e, u)) is not None:
        return h
    return activated(activation, e).mul_(u)


def product_gradients(
    activation: Activation, e: Tensor, u: Tensor, dh: Tensor, over: bool = False
) -> tuple[Tensor, Tensor]:
    """de and du. `over`: dh may be written over; e and u never are. All [..., F]."""
    du = activated(activation, e).mul_(dh)
    de = dh.mul_(u) if over else dh * u
    if activation == "silu":
        torch.ops.aten.silu_backward.grad_input(de, e, grad_input=de)
    else:
        torch.ops.aten.gelu_backward.grad_input(de, e, approximate=_approximation(activation), grad_input=de)
    return de, du


def _approximation(activation: Activation) -> str:
    return "tanh" if activation == "gelu_tanh" else "none"


def gated_product(activation: Activation, e: Tensor, u: Tensor, silu: SiluProduct | None = None) -> Tensor:
    """act(e) * u as one node. e, u: [..., F] -> [..., F]. The gradient is not differentiable again."""
    if e.dtype != u.dtype or e.shape != u.shape:  # what layers of other code may give: torch's own rules hold
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
        return None, *product_gradients(ctx.activation, *ctx.saved_tensors, *grads), None

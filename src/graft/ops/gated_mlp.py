"""A gated MLP, y = down(act(gate(x)) * up(x)), of frozen linear layers and their LoRAs as one autograd node.

Kept for backward are x, the outputs e and u of gate and up, and the S of rank R of each LoRA: neither act(e) nor h = act(e) * u, which
autograd keeps as the input of down. With l(x) = x W^T + s B A dropout(x) for each layer and G the gradient of y:

    dh = gradient of down at h, G        de, du as in `gated_product`        dx = gradient of gate at x, de + that of up at x, du

h is made again from e and u for the factors of down and for its dropout, whose mask is drawn again. The gradient of x goes where those of
other layers that read x go (`fused_base.as_read`). Equations: Ye et al. 2023, "mLoRA" (arXiv 2312.02515).

Legend: I features of x, F of e, u and h, O of y.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from graft.ops.frozen_linear import FrozenLinear
from graft.ops.gated_product import Activation, SiluProduct, product, product_gradients
from graft.ops.low_rank import LowRankUpdate, add_terms_, factor_gradients, factors_of, flat
from graft.ops.low_rank_linear import InputGradient, as_read


@dataclass(frozen=True, eq=False)
class Layer:
    """A frozen layer and what is added to its output."""

    frozen: FrozenLinear
    updates: Sequence[LowRankUpdate] = field(default_factory=list)

    def output(self, x: Tensor) -> tuple[Tensor, list[Tensor]]:
        """l(x), and the S of each term."""
        out = self.frozen.output(x)
        return out, add_terms_(out, x, self.updates)


def gated_mlp(
    x: Tensor, activation: Activation, gate: Layer, up: Layer, down: Layer, silu: SiluProduct | None = None
) -> Tensor:
    """y [..., O] of x [..., I]. The terms have to be such as `fused.one_node` allows. The gradient is not differentiable again."""
    x, gradient = as_read(x)
    factors = [factor for layer in (gate, up, down) for factor in factors_of(layer.updates)]
    multiply = functools.partial(product, activation, silu=silu)
    return _GatedMLP.apply(x, activation, multiply, (gate, up, down), gradient, *factors)  # pyright: ignore


class _GatedMLP(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, activation: Activation, multiply: Callable[[Tensor, Tensor], Tensor],
        layers: tuple[Layer, Layer, Layer], gradient: InputGradient | None, *factors: Tensor,
    ) -> Tensor:  # fmt: skip
        gate, up, down = layers
        (e, gate_lows), (u, up_lows) = gate.output(x), up.output(x)
        y, down_lows = down.output(multiply(e, u))
        ctx.activation, ctx.multiply, ctx.layers, ctx.gradient, ctx.shape = (
            activation,
            multiply,
            layers,
            gradient,
            x.shape,
        )
        stored = (layer.frozen.stored for layer in layers)
        kept = x if gate.updates or up.updates else None  # the frozen layers alone need no input in backward
        ctx.save_for_backward(kept, e, u, *stored, *gate_lows, *up_lows, *down_lows, *factors)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Any:
        (grad,), (x, e, u, *rest) = grads, ctx.saved_tensors
        gate, up, down = ctx.layers
        (gate_own, up_own, down_own) = _by_layer(ctx.layers, rest[3:], ctx.needs_input_grad[5:])
        below = ctx.gradient is not None or gate.updates or up.updates
        dh = torch.mm(flat(grad), down.frozen.weight(rest[2], e.dtype)).view(e.shape) if below else None
        made: list[Tensor | None] = []
        made_down: list[Tensor | None] = []
        if down.updates:
            made_down = factor_gradients(down.updates, grad, ctx.multiply(e, u), *down_own, dh, fresh=False)
        if dh is not None:
            de, du = product_gradients(ctx.activation, e, u, dh, over=True)
            for layer, stored, into, own in ((gate, rest[0], de, gate_own), (up, rest[1], du, up_own)):
                grad_x = None
                if ctx.gradient is not None:
                    grad_x = ctx.gradient.add(flat(into), layer.frozen.weight(stored, e.dtype), ctx.shape)
                if layer.updates:
                    made += factor_gradients(layer.updates, into, x, *own, grad_x, fresh=False)
        return None, None, None, None, None, *made, *made_down  # the gradient of x lies where `as_read` finds it


def _by_layer(
    layers: Sequence[Layer], saved: Sequence[Tensor], needs: Sequence[bool]
) -> list[tuple[list[Tensor], Sequence[bool]]]:
    """What `factor_gradients` reads of each layer: the S of its terms and their factors, and which of these want gradients."""
    lows, parts, start = sum(len(layer.updates) for layer in layers), [], 0
    for layer in layers:
        stop = start + len(layer.updates)
        of_terms, of_factors = slice(start, stop), slice(lows + 2 * start, lows + 2 * stop)
        parts.append(([*saved[of_terms], *saved[of_factors]], needs[2 * start : 2 * stop]))
        start = stop
    return parts

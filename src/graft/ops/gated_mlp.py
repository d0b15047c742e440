"""A gated MLP, y = down(act(gate(x)) * up(x)), of frozen linear layers and their low-rank updates as one autograd node.

The node saves x, the outputs e and u of gate and up, and the S of rank R of each update. It saves neither act(e) nor h = act(e) * u, which
autograd keeps as the input of down. With l(x) = x W^T + s B A dropout(x) for each layer and the gradient G of y:

    dh = gradient of down at h, G        de, du as in `gated_product`        dx = gradient of gate at x, de + gradient of up at x, du

The node computes h again from e and u for the factors of down, and draws down's dropout mask again. It leaves the gradient of x where the
other layers that read x leave theirs (`low_rank_linear.shared_input`).

Example: 4096 tokens in bfloat16, I = O = 4096, F = 14336. Saved are x (32 MiB, shared with other readers), e and u (112 MiB each). Without
the node autograd saves act(e) and, for the update of down, h as well: another 224 MiB in every layer. In backward two more tensors of
112 MiB exist at a time (without dropout): first dh and h, then dh and du. de is written over dh.

Equations: Ye et al. 2023, "mLoRA" (arXiv 2312.02515).

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
from graft.ops.low_rank import Update, add_updates_, factor_gradients, factors_of
from graft.ops.low_rank_linear import InputGradient, shared_input
from graft.ops.low_rank_update import as_matrix


@dataclass(frozen=True, eq=False)
class Layer:
    """A frozen layer and the updates to its output."""

    frozen: FrozenLinear
    updates: Sequence[Update] = field(default_factory=list)

    def output(self, x: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Return l(x), and the S of each update."""
        out = self.frozen.output(x)
        return out, add_updates_(out, x, self.updates)


def gated_mlp(
    x: Tensor, activation: Activation, gate: Layer, up: Layer, down: Layer, silu: SiluProduct | None = None
) -> Tensor:
    """Compute y. `low_rank.one_node` must hold for the updates. x: [..., I] -> [..., O]. The gradient cannot be differentiated again."""
    x, input_gradient = shared_input(x)
    factors = [factor for layer in (gate, up, down) for factor in factors_of(layer.updates)]
    multiply = functools.partial(product, activation, silu=silu)
    return _GatedMLP.apply(x, activation, multiply, (gate, up, down), input_gradient, *factors)  # pyright: ignore


class _GatedMLP(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, activation: Activation, multiply: Callable[[Tensor, Tensor], Tensor],
        layers: tuple[Layer, Layer, Layer], input_gradient: InputGradient | None, *factors: Tensor,
    ) -> Tensor:  # fmt: skip
        gate, up, down = layers
        (e, gate_lows), (u, up_lows) = gate.output(x), up.output(x)  # [..., F] each
        y, down_lows = down.output(multiply(e, u))  # h ends here
        ctx.activation, ctx.multiply, ctx.layers = activation, multiply, layers
        ctx.input_gradient, ctx.shape = input_gradient, x.shape
        stored = (layer.frozen.stored for layer in layers)
        kept_x = x if gate.updates or up.updates else None  # only dA of gate and up reads x; the frozen layers do not
        # One update at gate, none at up, two at down: x, e, u, W_gate, W_up, W_down, S of gate, two S of down, then A and B of the three
        # updates in the same order. `_by_layer` splits this list again.
        ctx.save_for_backward(kept_x, e, u, *stored, *gate_lows, *up_lows, *down_lows, *factors)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Any:
        (grad,), (x, e, u, *rest) = grads, ctx.saved_tensors
        gate, up, down = ctx.layers
        stored_gate, stored_up, stored_down, *saved = rest
        # Inputs 0 to 4 are x, activation, multiply, layers and input_gradient; the factors follow.
        own_gate, own_up, own_down = _by_layer(ctx.layers, saved, ctx.needs_input_grad[5:])

        # Down: dh = G W_down, to which `factor_gradients` adds M (T A). Nobody needs dh if x wants no gradient and gate and up are frozen.
        needs_dh = ctx.input_gradient is not None or gate.updates or up.updates
        dh = torch.mm(as_matrix(grad), down.frozen.weight(stored_down, e.dtype)).view(e.shape) if needs_dh else None
        down_grads: list[Tensor | None] = []
        if down.updates:
            down_grads = factor_gradients(down.updates, grad, ctx.multiply(e, u), *own_down, dh, overwrite=False)

        # Gate and up: both add their part of dx to the same tensor.
        factor_grads: list[Tensor | None] = []
        if dh is not None:
            de, du = product_gradients(ctx.activation, e, u, dh, overwrite=True)
            for layer, stored, grad_out, own in ((gate, stored_gate, de, own_gate), (up, stored_up, du, own_up)):
                grad_x = None
                if ctx.input_gradient is not None:
                    weight = layer.frozen.weight(stored, e.dtype)
                    grad_x = ctx.input_gradient.add(as_matrix(grad_out), weight, ctx.shape)
                if layer.updates:
                    factor_grads += factor_gradients(layer.updates, grad_out, x, *own, grad_x, overwrite=False)
        return None, None, None, None, None, *factor_grads, *down_grads  # `shared_input` returns the gradient of x


def _by_layer(
    layers: Sequence[Layer], saved: Sequence[Tensor], needs: Sequence[bool]
) -> list[tuple[list[Tensor], Sequence[bool]]]:
    """Split the saved tensors and `needs` by layer, into what `factor_gradients` takes: the S and the factors of the layer's updates.

    Layers with 1, 0 and 2 updates save [S0, S1, S2, A0, B0, A1, B1, A2, B2], which becomes [S0, A0, B0], [] and [S1, S2, A1, B1, A2, B2].
    """
    num_updates, parts, start = sum(len(layer.updates) for layer in layers), [], 0
    for layer in layers:
        stop = start + len(layer.updates)
        of_updates, of_factors = slice(start, stop), slice(num_updates + 2 * start, num_updates + 2 * stop)
        parts.append(([*saved[of_updates], *saved[of_factors]], needs[2 * start : 2 * stop]))
        start = stop
    return parts

"""The forward of a gated MLP while gradients are recorded: frozen layers and their LoRAs as one node, or only the product as a node.

If each layer is a frozen linear layer with nothing but low-rank updates, the whole MLP is one autograd node (`ops/gated_mlp.py`), and
adapters of the MLP's output act after it. Otherwise the layers run as they are, with their adapters and hooks, and only the product of
gate and up is a node (`ops/gated_product.py`). The model's own forward runs without gradients, on the bare base, under autocast, in
compiled code, under function transforms, and if hooks have to see its modules.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from graft.architectures.blocks import Block
from graft.architectures.torch_internals import has_hooks, in_function_transform
from graft.errors import GraftError
from graft.injection.container import OFFLOADED, AdapterContainer
from graft.injection.gated_proof import Gated, gated_mlps
from graft.injection.hooks import HostedAdapter
from graft.injection.rows import NO_NAMES, RowGroups
from graft.injection.state import State
from graft.injection.substitution import register_mixin, substitute
from graft.ops.frozen_linear import frozen_linear
from graft.ops.gated_mlp import Layer, gated_mlp
from graft.ops.gated_product import gated_product
from graft.ops.low_rank import factors_of, one_node
from graft.routing.rows import by_rows

GATED = "graft_gated"
"""The attribute in which a gated MLP keeps its `Gated`."""


@register_mixin
class GatedForward:
    """Mixin for a gated MLP: runs it as nodes where that is possible."""

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        if not torch.compiler.is_compiling() and len(args) == 1 and not kwargs:
            out = _run(self, self.__dict__["graft_state"], self.__dict__[GATED], args[0])
            if out is not None:
                return out
        return super().forward(*args, **kwargs)  # pyright: ignore


def install_gated_mlps(blocks: list[Block], state: State) -> None:
    """Give every gated MLP of a model this forward."""
    for module, gated in gated_mlps(blocks):
        module.__dict__["graft_state"], module.__dict__[GATED] = state, gated
        substitute(module, GatedForward)


def _run(host: nn.Module, state: State, gated: Gated, x: Any) -> Tensor | None:
    """Return the output, or None if the model's own forward has to run."""
    bare = state.current.rows is None or state.merged is not None
    if bare or state.reached is not None or not (_plain(x) and _as_proved(host, gated)):
        return None
    layers = [host._modules[name] for name in gated.layers]
    if any(layer is None for layer in layers):
        return None
    gate, up, down = (layer for layer in layers if layer is not None)
    whole = _as_one_node(gated, (gate, up, down), x, state)
    if whole is not None:
        return whole
    return down(gated_product(gated.activation, gate(x), up(x), state.silu_product))


def _plain(x: Any) -> bool:
    """Whether autograd records the tensor's gradient, and nothing else has to see the operations."""
    return (
        type(x) is Tensor and torch.is_grad_enabled() and not x.is_meta and not torch.is_autocast_enabled(x.device.type)
        and not in_function_transform()
    )  # fmt: skip


def _as_proved(host: nn.Module, gated: Gated) -> bool:
    """Whether the proof still holds: the same other modules, a mode that it covers, and no hooks on them."""
    now = [module for name, module in host._modules.items() if name not in gated.layers and name != "graft"]
    there = all(any(module is other for other in gated.others) for module in now)
    off = not gated.evaluating or not any(module.training for module in (host, *gated.others))
    return there and off and not any(has_hooks(module) for module in gated.others)


def _as_one_node(
    gated: Gated, layers: tuple[nn.Module, nn.Module, nn.Module], given: Tensor, state: State
) -> Tensor | None:
    """Return the output of the whole MLP by one node.

    None if a layer is not frozen or has adapters that the node cannot compute, and if no gradient is needed.
    """
    rows = RowGroups(state.current)
    x, parts = by_rows(given, state.current), []
    done = NO_NAMES
    for layer in layers:
        frozen, updates, done = None if has_hooks(layer) else frozen_linear(layer, x), [], NO_NAMES
        if isinstance(container := layer._modules.get("graft"), AdapterContainer):
            if given.dim() == 2 and container.is_expert:
                return None
            updates, done = container.low_rank(x, rows)
            if not _leaves_alone(container, done, rows, last=layer is layers[-1]):
                return None
        if frozen is None or not one_node(updates, x.device):
            return None
        parts.append(Layer(frozen, updates))
    if not (x.requires_grad or any(f.requires_grad for part in parts for f in factors_of(part.updates))):
        return None
    y = gated_mlp(x, gated.activation, parts[0], parts[1], parts[2], state.silu_product)
    if isinstance(container := layers[-1]._modules.get("graft"), AdapterContainer):
        if any(parameter.is_meta for each in _others(container, done, rows) for parameter in each.adapter.parameters()):
            raise GraftError(OFFLOADED)
        y = container.adapt(
            y, y, rows, done
        )  # adapters of the MLP's output; none of them reads the input of down, so y stands in for it
    return y.reshape(*given.shape[:-1], y.shape[-1])


def _others(container: AdapterContainer, done: frozenset[str], rows: RowGroups) -> list[HostedAdapter]:
    """Return the adapters in use at a layer that are more than a low-rank update."""
    return [
        each for name in rows.names(container.hooks.adapt) if name not in done for each in container.hooks.adapt[name]
    ]


def _leaves_alone(container: AdapterContainer, done: frozenset[str], rows: RowGroups, last: bool) -> bool:
    """Whether the other adapters at a layer allow the node: there are none, or they only change the output of the last layer."""
    if rows.names(container.hooks.send):
        return False
    others = _others(container, done, rows)
    return not others or last and all(_reads_elsewhere(hosted) for hosted in others)


def _reads_elsewhere(hosted: HostedAdapter) -> bool:
    """Whether an adapter needs neither the input of its host nor the host itself."""
    own_input = not hosted.remote and (hosted.acts_before or hosted.adapter.reads != "nothing")
    return not own_input and not hosted.adapter.runs_host

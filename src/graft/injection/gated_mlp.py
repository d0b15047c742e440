"""The forward of a gated MLP while it is trained through: frozen layers and their LoRAs as one node, or the product in its middle.

Where each layer is a frozen linear one with nothing but low-rank terms on it, all of it is one node (`adapters/gated_mlp.py`); adapters of
the MLP's output act behind that. Elsewhere the layers run as they are, adapters, hooks and all, and the product alone is a node
(`adapters/gated_product.py`). Without gradients, on the bare base, under autocast, in compiled code, under function transforms and with
hooks in the way the model's own forward runs.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from graft.architectures.blocks import Block
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


@register_mixin
class GatedForward:
    """Mixin for a gated MLP."""

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        if not torch.compiler.is_compiling() and len(args) == 1 and not kwargs:
            out = _run(self, self.__dict__["graft_state"], self.__dict__[GATED], args[0])
            if out is not None:
                return out
        return super().forward(*args, **kwargs)  # pyright: ignore


def install_gated_mlps(blocks: list[Block], state: State) -> None:
    """Give every gated MLP of a model that forward."""
    for module, gated in gated_mlps(blocks):
        module.__dict__["graft_state"], module.__dict__[GATED] = state, gated
        substitute(module, GatedForward)


def _run(host: nn.Module, state: State, gated: Gated, x: Any) -> Tensor | None:
    """The output; None where the model's own forward has to run."""
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
    """Whether a tensor's gradient is recorded by autograd alone."""
    return (
        type(x) is Tensor and torch.is_grad_enabled() and not x.is_meta and not torch.is_autocast_enabled(x.device.type)
        and not torch._C._are_functorch_transforms_active()
    )  # fmt: skip


def _as_proved(host: nn.Module, gated: Gated) -> bool:
    """Whether the modules that the equation leaves out are those of the proof, in a mode that it holds in, with nobody looking on."""
    now = [module for name, module in host._modules.items() if name not in gated.layers and name != "graft"]
    there = all(any(module is other for other in gated.others) for module in now)
    off = not gated.evaluating or not any(module.training for module in (host, *gated.others))
    return there and off and not any(_hooked(module) for module in gated.others)


def _hooked(module: nn.Module) -> bool:
    """Whether calling a module does more than its class's forward."""
    tables = module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks
    return "forward" in module.__dict__ or any(map(len, tables)) or bool(nn.modules.module._has_any_global_hook())


def _as_one_node(
    gated: Gated, layers: tuple[nn.Module, nn.Module, nn.Module], given: Tensor, state: State
) -> Tensor | None:
    """All of the MLP in one operation; None where a layer is not a frozen one with low-rank terms, and where nothing is to be kept."""
    rows = RowGroups(state.current)
    x, parts = by_rows(given, state.current), []
    done = NO_NAMES
    for layer in layers:
        frozen, updates, done = None if _hooked(layer) else frozen_linear(layer, x), [], NO_NAMES
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
        y = container.adapt(y, y, rows, done)  # adapters of the MLP's output, which do not read its input here
    return y.reshape(*given.shape[:-1], y.shape[-1])


def _others(container: AdapterContainer, done: frozenset[str], rows: RowGroups) -> list[HostedAdapter]:
    """The adapters of the pass at a layer that are more than a low-rank update."""
    return [
        each for name in rows.names(container.hooks.adapt) if name not in done for each in container.hooks.adapt[name]
    ]


def _leaves_alone(container: AdapterContainer, done: frozenset[str], rows: RowGroups, last: bool) -> bool:
    """Whether the adapters of a layer that are no low-rank updates leave it alone; at the last layer they may change the output."""
    if any(True for _ in rows.names(container.hooks.send)):
        return False
    others = _others(container, done, rows)
    return not others or last and all(_reads_elsewhere(hosted) for hosted in others)


def _reads_elsewhere(hosted: HostedAdapter) -> bool:
    own_input = not hosted.remote and (hosted.acts_before or hosted.adapter.reads != "nothing")
    return not own_input and not hosted.adapter.runs_host

"""Find the gated MLPs of a model, y = down(act(gate(x)) * up(x)), by the sites gate, up and down, and prove the equation by numbers.

A module's class may do more than its layers show (a clamp, a sparse activation, a norm, dropout), and in some layers only. So the module's
own forward runs with small layers in place of its own, in two dtypes and both modes, and has to give the equation's numbers bit for bit.
A module that does not keeps its own forward.

Why: `_modules` is written to put in the small layers, because the forward finds its layers there.
Breaks: if a forward keeps its layers elsewhere. It then fails on the small input, and the module keeps its own forward.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from graft.architectures.blocks import Block
from graft.architectures.layers import is_linear
from graft.ops.gated_product import ACTIVATIONS, Activation, activated

SITES = ("mlp.gate", "mlp.up", "mlp.down")
WIDTH, HIDDEN = 8, 12
"""The small layers' width of the residual stream, and of the hidden layer."""


@dataclass(frozen=True, eq=False)
class Gated:
    """A gated MLP for which the equation is proved."""

    layers: tuple[str, str, str]
    """The names of its children gate, up and down."""
    activation: Activation
    others: tuple[nn.Module, ...]
    """Its other modules, which the equation does not run: the activation, or dropout that is off."""
    evaluating: bool
    """Whether the equation holds only in evaluation mode."""


def gated_mlps(blocks: list[Block]) -> Iterator[tuple[nn.Module, Gated]]:
    """Yield the gated MLPs of a model. Modules of one class with equal settings share a proof."""
    proofs: dict[Any, tuple[Activation, bool] | None] = {}
    for block in blocks:
        linears = block.family.linears
        paths = [linears.get(site, "") for site in SITES]
        parents = {path.rpartition(".")[0] for path in paths}
        if len(parents) > 1 or "" in parents:
            continue
        module = block.module.get_submodule(parents.pop())
        gate, up, down = names = tuple(path.rpartition(".")[2] for path in paths)
        others = _others(module, names)
        if others is None:
            continue
        alike = names, tuple(_settings(each) for each in (module, *others))
        if alike not in proofs:
            proofs[alike] = _proved(module, names, others)
        if (proof := proofs[alike]) is not None:
            yield module, Gated((gate, up, down), proof[0], others, evaluating=proof[1])


def _others(module: nn.Module, names: Sequence[str]) -> tuple[nn.Module, ...] | None:
    """Return a module's descendants besides its three linear layers; None if one of them has weights or a forward on the instance."""
    layers = [module._modules[name] for name in names]
    known = {module, *(each for layer in layers if layer is not None for each in layer.modules())}
    others = tuple(each for each in module.modules() if each not in known)
    weightless = not any(each._parameters or each._buffers or "forward" in each.__dict__ for each in (module, *others))
    return others if weightless and all(layer is not None and is_linear(layer) for layer in layers) else None


def _settings(module: nn.Module) -> tuple[Any, ...]:
    """Return a key that is equal for modules that compute alike: class and attributes. Attributes that are objects count by identity."""
    simple = (bool, int, float, str, type(None))
    own = ((key, value) for key, value in module.__dict__.items() if key not in _OF_EVERY_MODULE)
    return type(module), *((key, value if isinstance(value, simple) else id(value)) for key, value in own)


_OF_EVERY_MODULE = frozenset(nn.Module().__dict__)


def _proved(module: nn.Module, names: Sequence[str], others: Sequence[nn.Module]) -> tuple[Activation, bool] | None:
    """Return the activation, and whether the equation holds only in evaluation mode; None if it does not hold."""
    in_modes: list[Activation | None] = []
    with torch.random.fork_rng(devices=()), _replaced(module, names):  # layers and dropout draw on the CPU
        for training in (False, True):
            with _in_mode((module, *others), training):
                in_modes.append(_activation(module, names))
    return None if in_modes[0] is None else (in_modes[0], in_modes[1] != in_modes[0])


def _activation(module: nn.Module, names: Sequence[str]) -> Activation | None:
    """Return the activation with which the equation equals the module's own forward, None if there is not exactly one."""
    fitting: set[Activation] = set(ACTIVATIONS)
    for dtype in (torch.float32, torch.bfloat16):
        gate, up, down = (module._modules[name].to(dtype) for name in names)  # pyright: ignore
        x = torch.randn(2, 3, WIDTH, generator=torch.Generator().manual_seed(1))
        x = torch.cat([x, 100 * x]).to(dtype)  # large inputs too, which a clamp would change
        try:
            own = type(module).forward(module, x)
        except (
            RuntimeError,
            TypeError,
            ValueError,
            AttributeError,
        ):  # it needs the sizes or the class of its own layers
            return None
        if not isinstance(own, Tensor):
            return None
        fitting = {each for each in fitting if torch.equal(own, down(activated(each, gate(x)) * up(x)))}
    return fitting.pop() if len(fitting) == 1 else None


@contextmanager
def _replaced(module: nn.Module, names: Sequence[str]) -> Iterator[None]:
    """Put small random layers in place of a module's own, for a block of code."""
    before = {name: module._modules[name] for name in names}
    generator = torch.Generator().manual_seed(0)
    try:
        for name, (inputs, outputs) in zip(names, [(WIDTH, HIDDEN), (WIDTH, HIDDEN), (HIDDEN, WIDTH)], strict=True):
            layer = nn.Linear(inputs, outputs, device="cpu", dtype=torch.float32).requires_grad_(False)
            for parameter in layer.parameters():
                parameter.normal_(0.0, inputs**-0.5, generator=generator)
            module._modules[name] = layer
        yield
    finally:
        module._modules.update(before)


@contextmanager
def _in_mode(modules: Sequence[nn.Module], training: bool) -> Iterator[None]:
    before = {module: module.training for module in modules}
    try:
        for module in modules:
            module.training = training
        yield
    finally:
        for module, mode in before.items():
            module.training = mode

"""Training and evaluation mode of a model with adapters, at a cost that depends on the base and hardly on how many adapters there are.

torch's own `train` and `eval` walk every module of every adapter. Here the base's modules are set one by one, and those of an adapter
only where their mode differs.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager

from torch import nn

from graft.architectures.walk import base_modules
from graft.injection.state import State


def set_modes(root: nn.Module, state: State, base: bool, adapters: Collection[str]) -> None:
    """Put the base into training mode or not, and exactly these adapters into training mode."""
    for _, module in base_modules(root):
        module.training = base
    for name, attached in state.adapters.items():
        attached.train(name in adapters)


@contextmanager
def evaluation_mode(root: nn.Module, state: State | None) -> Iterator[None]:
    """Put a model into evaluation mode for a block of code; every mode comes back."""
    modules = [module for _, module in base_modules(root) if module.training]
    adapters = [
        each for attached in (state.adapters.values() if state else ()) for each in attached.in_mode(training=True)
    ]
    for module in modules:
        module.training = False
    for adapter in adapters:
        adapter.train(False)
    try:
        yield
    finally:
        for module in modules:
            module.training = True
        for adapter in adapters:
            adapter.train(True)

"""Set training and evaluation mode of a model with adapters, at a cost that hardly depends on the number of adapters.

torch's own `train` and `eval` visit every module of every adapter. These functions set the modules of the base one by one, and those of
an adapter only if their mode differs.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager

from torch import nn

from graft.architectures.walk import base_modules
from graft.injection.state import State, unwrapped


def set_modes(root: nn.Module, state: State, base: bool, adapters: Collection[str]) -> None:
    """Put the base into training or evaluation mode, these adapters into training mode, and all others into evaluation mode."""
    for _, module in base_modules(root):
        module.training = base
    for name, attached in state.adapters.items():
        attached.train(name in adapters)


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Put a model into evaluation mode for a block of code. Every module gets its mode back."""
    root = unwrapped(model)
    state: State | None = root.__dict__.get("graft_state")
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

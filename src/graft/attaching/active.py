"""Choose which adapter serves which rows, for a block of code or from now on, and which adapters train."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from torch import nn

from graft.attaching.parameters import parameters
from graft.injection.state import state_of
from graft.routing.context import ForwardContext


@contextmanager
def use(model: nn.Module, name: str | None) -> Iterator[None]:
    """Make one adapter active for all rows in a block of code; None is the bare base. The choice before comes back whatever happens."""
    with state_of(model).entered(ForwardContext(name)):
        yield


@contextmanager
def route(model: nn.Module, rows: Sequence[str | None]) -> Iterator[None]:
    """Choose one adapter (or None) for each row of the batch in a block of code; the base runs once on all rows."""
    with state_of(model).entered(ForwardContext(tuple(rows))):
        yield


@contextmanager
def running(model: nn.Module, context: ForwardContext) -> Iterator[None]:
    """Run a block of code under a pass that the caller has described in full (the training engine, generation)."""
    with state_of(model).entered(context):
        yield


def set_active(model: nn.Module, name: str | None) -> None:
    """Make one adapter active from now on, and the only one that trains; None leaves the bare base."""
    state_of(model).enter(ForwardContext(name))
    set_trainable(model, () if name is None else (name,))


def set_trainable(model: nn.Module, names: Sequence[str]) -> None:
    """Let exactly these adapters require gradients."""
    state = state_of(model)
    for name in names:
        state.adapter(name)
    state.trained = tuple(names)
    for name, attached in state.adapters.items():
        trains = name in names
        if attached.trains == trains:
            continue
        attached.trains = trains
        for _, parameter in parameters(model, name):
            parameter.requires_grad_(trains and parameter.is_floating_point())

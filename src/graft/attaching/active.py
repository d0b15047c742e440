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
    """Make one adapter active for all rows in a block of code (None: the bare base). The choice before is restored, also after an error."""
    with state_of(model).entered(ForwardContext(name)):
        yield


@contextmanager
def route(model: nn.Module, rows: Sequence[str | None]) -> Iterator[None]:
    """Choose one adapter, or None for the bare base, for each row of a batch in a block of code. The base runs once on all rows.

    rows: one name per row, e.g. `["math", None, "code"]` for a batch of three.
    """
    with state_of(model).entered(ForwardContext(tuple(rows))):
        yield


@contextmanager
def running(model: nn.Module, context: ForwardContext) -> Iterator[None]:
    """Run a block of code under a forward context of the caller's own, as the training engine and generation do."""
    with state_of(model).entered(context):
        yield


def set_active(model: nn.Module, name: str | None) -> None:
    """Make one adapter active from now on, and let only this one train. With None the bare base is active, and nothing trains."""
    state_of(model).enter(ForwardContext(name))
    set_trainable(model, () if name is None else (name,))


def set_trainable(model: nn.Module, names: Sequence[str]) -> None:
    """Let the parameters of these adapters require gradients, and those of no other."""
    state = state_of(model)
    for name in names:
        state.adapter(name)
    state.trained = tuple(names)
    for name, attached in state.adapters.items():
        if name in names or attached.requires_grad:
            for _, parameter in parameters(model, name):
                parameter.requires_grad_(name in names and parameter.is_floating_point())

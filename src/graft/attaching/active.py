"""Choose which adapter serves which rows, for a block of code or from now on, and which adapters train."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from torch import nn

from graft.attaching.parameters import parameters
from graft.attaching.together import Choice, name_of
from graft.errors import GraftError
from graft.injection.state import state_of
from graft.routing.context import ForwardContext


@contextmanager
def use(model: nn.Module, name: Choice) -> Iterator[None]:
    """Make an adapter active for all rows in a block of code (None: the bare base). The choice before is restored, also after an error.

    Several adapters can act on the same rows: a list names them in their order, a mapping gives each a weight, as in
    `use(model, {"style": 0.5, "task": 1.0})`. Differences of weights add up, and others act one after another (`injection/together.py`).
    Raises `GraftError` for a name that is not attached and for adapters that cannot act together.
    """
    with state_of(model).entered(ForwardContext(name_of(model, name))):
        yield


@contextmanager
def route(model: nn.Module, rows: Sequence[Choice]) -> Iterator[None]:
    """Choose an adapter, or None for the bare base, for each row of a batch in a block of code. The base runs once on all rows.

    rows: one choice per row, e.g. `["math", None, ["style", "code"], {"style": 0.5}]` for a batch of four. See `use`.
    Raises `GraftError` for anything but a list of choices.
    """
    if isinstance(rows, str) or not isinstance(rows, Sequence) or not rows:
        raise GraftError(
            f"a routing is a list with a choice for each row of the batch; given: {rows!r}. For one choice on all rows there is graft.use"
        )
    with state_of(model).entered(ForwardContext(tuple(name_of(model, row) for row in rows))):
        yield


@contextmanager
def running(model: nn.Module, context: ForwardContext) -> Iterator[None]:
    """Run a block of code under a forward context of the caller's own, as the training engine and generation do."""
    with state_of(model).entered(context):
        yield


def set_active(model: nn.Module, name: Choice) -> None:
    """Make an adapter active from now on, and let only this one train. With None the bare base is active, and nothing trains.

    Of several adapters (see `use`) all train.
    """
    state_of(model).enter(ForwardContext(name_of(model, name)))
    set_trainable(model, () if name is None else (name,) if isinstance(name, str) else tuple(name))


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

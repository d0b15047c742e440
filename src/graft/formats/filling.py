"""Attach the adapter that a file describes, and fill it: first its shapes are compared, then memory is spent."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from torch import Tensor, nn

from graft.adapters.base import Adapter, AdapterConfig
from graft.adapters.filling import to_be_filled
from graft.attaching.attach import attach, detach
from graft.attaching.parameters import modules_of, tensors
from graft.attaching.planning import check_shapes
from graft.attaching.stored import copy_strictly
from graft.injection.state import state_of, unwrapped


def attach_filled(
    model: nn.Module,
    name: str,
    config: AdapterConfig,
    stored: Mapping[str, Tensor],
    origin: str,
    then: Callable[[], None] = lambda: None,
) -> None:
    """Attach an adapter under a name, with these tensors.

    stored: by Graft's own names. origin: where they come from, for messages. then: a last check, after the others.
    Raises `GraftError` for tensors that are missing, extra, misshapen or no numbers of the right kind; the model is then unchanged.
    """
    check_shapes(model, config, {key: tuple(tensor.shape) for key, tensor in stored.items()}, origin)
    with to_be_filled():
        attach(model, {name: config})
    root, state = unwrapped(model), state_of(model)
    try:
        copy_strictly(stored, dict(tensors(root, state, name)), origin)
        for _, module in modules_of(root, state, name):
            if isinstance(module, Adapter):
                module.check_filled()
        then()
    except BaseException:
        detach(model, name)
        raise

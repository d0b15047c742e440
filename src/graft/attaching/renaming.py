"""Give an attached adapter another name, and attach a copy of it."""

from __future__ import annotations

import torch
from torch import nn

from graft.adapters.filling import to_be_filled
from graft.architectures.walk import CONTAINER, base_modules
from graft.attaching.attach import attach, check_name
from graft.attaching.parameters import tensors
from graft.attaching.together import remove as remove_combination
from graft.attaching.together import with_adapter
from graft.errors import GraftError
from graft.injection.container import AdapterContainer
from graft.injection.state import state_of, unwrapped


def rename(model: nn.Module, old: str, new: str) -> None:
    """Give an adapter another name. Raises `GraftError` while it serves rows together with others."""
    root, state = unwrapped(model), state_of(model)
    attached = state.adapter(old)
    if new in state.adapters:
        raise GraftError(f"an adapter '{new}' is attached already; attached: {', '.join(state.adapters)}")
    check_name(new)
    for combination in with_adapter(state, old):
        if combination in state.names_in_use:
            raise GraftError(
                f"adapter '{old}' serves rows together with others ({combination}): choose another adapter first"
            )
        remove_combination(root, state, combination)
    for _, module in base_modules(root):
        container = module._modules.get(CONTAINER)
        if isinstance(container, AdapterContainer):
            container.rename(old, new)
        shifts = module.__dict__.get("graft_shifts", {})
        if old in shifts:
            shifts[new] = shifts.pop(old)
    state.adapters = {new if name == old else name: item for name, item in state.adapters.items()}
    assert state.adapters[new] is attached
    state.reroute(old, new)


def copy(model: nn.Module, name: str, new: str) -> None:
    """Attach a copy of an adapter, with its weights, under another name."""
    root, state = unwrapped(model), state_of(model)
    attached = state.adapter(name)
    with to_be_filled():
        attach(model, {new: attached.config})
    with torch.no_grad():
        fresh = dict(tensors(root, state, new))
        for key, tensor in tensors(root, state, name):
            fresh[key].copy_(tensor)

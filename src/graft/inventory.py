"""What is attached: names, modules, tensors and parameters of a model's adapters."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn

from graft.state import State, part_of, state_of, unwrapped


def names(model: nn.Module) -> tuple[str, ...]:
    """The attached adapters, in the order of attaching."""
    state = unwrapped(model).__dict__.get("graft_state")
    return () if state is None else tuple(state.entries)


def modules_of(root: nn.Module, state: State, name: str) -> Iterator[tuple[str, nn.Module]]:
    """(path without Graft's own part, module) of every module that is the adapter: one per site, then the shared ones."""
    entry = state.entry(name)
    for seat in entry.seats:
        yield f"{seat.site.module}.{seat.key}".lstrip("."), seat.module_of(root, name)
    for key in entry.shared:
        yield key, part_of(root, "", name, key)


def tensors(root: nn.Module, state: State, name: str) -> Iterator[tuple[str, torch.Tensor]]:
    """(name, tensor) of all that is the adapter: its parameters and persistent buffers, live."""
    for path, module in modules_of(root, state, name):
        for key, tensor in module.state_dict(keep_vars=True).items():
            yield f"{path}.{key}", tensor


def parameters(model: nn.Module, name: str) -> Iterator[tuple[str, nn.Parameter]]:
    """(name, parameter) of what trains in an adapter."""
    for path, module in modules_of(unwrapped(model), state_of(model), name):
        for key, parameter in module.named_parameters():
            yield f"{path}.{key}", parameter

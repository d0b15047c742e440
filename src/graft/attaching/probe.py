"""Prove that every site is reached: one tiny forward pass after attaching.

A module whose forward is never called (its parent reads the weight directly, or a hook replaced it) would take an adapter in silence.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from graft.architectures.blocks import TOWERS, stack_of
from graft.architectures.transformers_internals import device_of
from graft.architectures.walk import CONTAINER, base_modules
from graft.errors import GraftError
from graft.injection.container import AdapterContainer
from graft.injection.modes import evaluation_mode
from graft.injection.state import State, site_table_of
from graft.routing.context import ForwardContext


def probe(root: nn.Module, state: State, names: tuple[str, ...]) -> None:
    """Run a few tokens through the model under each new adapter. Raises `GraftError` that names the sites that were not reached.

    What was reached before is not tried again: the same adapter class in the same role at the same module.
    Modules other than transformers models and chains of layers are not probed: their input is unknown. Neither are models
    on the meta device (for counting), whose masks cannot be computed.
    """
    hosts = {
        path: module
        for path, module in base_modules(root)
        if isinstance(module._modules.get(CONTAINER), AdapterContainer)
    }
    roles = {name: _roles(hosts, name) for name in names}
    new = [name for name in names if not roles[name] <= state.proved]
    inputs = _inputs(root) if new else None
    if inputs is None:
        return
    text = isinstance(inputs, dict) and "input_ids" in inputs  # which towers for images and sound do not see
    with evaluation_mode(root, state):
        for name in new:
            reached = _reached(root, state, name, inputs)
            paths = dict.fromkeys(path for path, *_ in sorted(roles[name], key=lambda role: role[0]))
            silent = [
                path
                for path in paths
                if id(hosts[path]._modules[CONTAINER]) not in reached
                and (not text or stack_of(path) not in TOWERS.values())
            ]
            if silent:
                raise GraftError(
                    f"adapter '{name}': {len(silent)} of {len(paths)} sites are never called in a forward pass, among them '{silent[0]}' "
                    f"({type(root.get_submodule(silent[0])).__name__}): its parent uses the weight directly. Choose other sites."
                )
            state.proved |= roles[name]


def _reached(root: nn.Module, state: State, name: str, inputs: Any) -> set[int]:
    """The containers, by id, that one forward pass under an adapter comes by."""
    state.reached = set()
    try:
        with torch.no_grad(), state.entered(ForwardContext(name)):
            root(**inputs) if isinstance(inputs, dict) else root(inputs)
        return state.reached
    finally:
        state.reached = None


def _roles(hosts: Mapping[str, nn.Module], name: str) -> set[tuple[str, str, type]]:
    """(module, hook, adapter class) of everything that an adapter does in the model."""
    return {
        (path, hook, type(getattr(adapter, "adapter", adapter)))
        for path, module in hosts.items()
        for hook, adapter in module._modules[CONTAINER].hooks.of(name)  # pyright: ignore
    }


def _inputs(root: Any) -> Any:
    device = device_of(root)
    if device.type == "meta":
        return None
    if getattr(root, "main_input_name", None) == "pixel_values":
        return {"pixel_values": _image(root, device)}
    dummy = getattr(root, "dummy_inputs", None)
    if isinstance(dummy, dict):
        given = {name: tensor.to(device) for name, tensor in dummy.items() if tensor is not None}
        if "ForSequenceClassification" in type(root).__name__ and root.config.is_encoder_decoder:
            given = {
                "input_ids": torch.full((2, 5), root.config.eos_token_id, device=device)
            }  # they read the class at its place
        return given | {"use_cache": False} | _encoder_states(root, device)
    if isinstance(root, nn.Sequential) and isinstance(first := root[0], nn.Linear):
        return torch.zeros(2, first.in_features, device=device, dtype=first.weight.dtype)
    return None


def _encoder_states(root: Any, device: torch.device) -> dict[str, Any]:
    """For a decoder on its own: states of an encoder that is not there, without which attention over it is never called."""
    rows, takes = len(root.dummy_inputs["input_ids"]), inspect.signature(root.forward).parameters
    sites = site_table_of(root).by_name.get("cross.k", [])
    if not sites or "decoder_input_ids" in takes:
        return {}
    states = torch.zeros(rows, 2, sites[0].in_features, device=device, dtype=root.dtype)
    return {"encoder_hidden_states": states} if "encoder_hidden_states" in takes else {"encoder_outputs": (states,)}


def _image(root: Any, device: torch.device) -> torch.Tensor:
    """One black image [1, C, H, W] of the size that the model was made for."""
    config = getattr(root.config, "vision_config", root.config)
    size = config.image_size
    height, width = size if isinstance(size, list | tuple) else (size, size)
    return torch.zeros(1, config.num_channels, height, width, device=device, dtype=root.dtype)

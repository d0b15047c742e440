"""Prove by one tiny forward pass after attaching that every site is reached.

An adapter would have no effect, without an error, at a module that is never called: its parent may read the weight directly.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from graft.adapters.base import AdapterConfig
from graft.architectures.blocks import TOWERS, stack_of
from graft.architectures.transformers_internals import device_of
from graft.architectures.walk import CONTAINER, base_modules
from graft.errors import DoesNotWork, GraftError
from graft.injection.container import AdapterContainer
from graft.injection.modes import evaluation_mode
from graft.injection.state import State, site_table_of
from graft.routing.context import ForwardContext


def probe(root: nn.Module, state: State, names: tuple[str, ...]) -> None:
    """Run a few tokens through the model under each new adapter. Raises `GraftError` if a site was not reached, with its name.

    An adapter class that was reached in the same table of the same module is not tried again.
    Only transformers models and an `nn.Sequential` that begins with a linear layer are probed, since other inputs are not known. Models on
    the meta device cannot compute masks, so they are not probed.
    """
    hosts = {
        path: module
        for path, module in base_modules(root)
        if isinstance(module._modules.get(CONTAINER), AdapterContainer)
    }
    roles = {name: _roles(hosts, name) for name in names}
    new = [name for name in names if not roles[name] <= state.proved]
    if not new:
        return
    with explained(root, state, [state.adapter(new[0]).config], "making a trial input"):
        inputs = _inputs(root)
    if inputs is None:
        return
    text = isinstance(inputs, dict) and "input_ids" in inputs  # towers for images and sound do not run on these
    with evaluation_mode(root):
        for name in new:
            with explained(root, state, [state.adapter(name).config], "a trial pass"):
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


@contextmanager
def explained(root: nn.Module, state: State, configs: Iterable[AdapterConfig], doing: str) -> Iterator[None]:
    """Turn any exception of attaching an adapter into a `GraftError` that names kind, model and cause.

    If the bare base fails on the trial input too, the message says so.
    """
    try:
        yield
    except (GraftError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # the code of any model runs here
        cause = f"{type(error).__name__}: {' '.join(str(error).split()) or 'no message'}"
        kinds = " and ".join(dict.fromkeys(part.kind for config in configs for part in config.parts()))
        own = _own_failure(root, state)
        if own is not None:
            raise DoesNotWork(
                f"{type(root).__name__} fails on a few tokens without any adapter ({own}), so no adapter can be tried on it"
            ) from error
        raise DoesNotWork(
            f"kind '{kinds}' does not work on {type(root).__name__}: {doing} fails ({cause}). Choose another kind or other sites"
        ) from error


def _own_failure(root: Any, state: State) -> str | None:
    """Return how the bare base fails on the trial input, None if it runs."""
    try:
        inputs = _inputs(root)
        with evaluation_mode(root), torch.no_grad(), state.carrying(ForwardContext()):
            if inputs is not None:
                root(**inputs) if isinstance(inputs, dict) else root(inputs)
    except Exception as error:  # as above
        return f"{type(error).__name__}: {' '.join(str(error).split())}"
    return None


def _reached(root: nn.Module, state: State, name: str, inputs: Any) -> set[int]:
    """Return the ids of the containers that one forward pass under an adapter reaches."""
    state.reached = set()
    try:
        with torch.no_grad(), state.entered(ForwardContext(name)):
            root(**inputs) if isinstance(inputs, dict) else root(inputs)
        return state.reached
    finally:
        state.reached = None


def _roles(hosts: Mapping[str, nn.Module], name: str) -> set[tuple[str, str, type]]:
    """Return (module, table, adapter class) of everything that an adapter does in the model."""
    return {
        (path, hook, type(getattr(adapter, "adapter", adapter)))
        for path, module in hosts.items()
        for hook, adapter in module._modules[CONTAINER].hooks.of(name)  # pyright: ignore
    }


def _inputs(root: Any) -> Any:
    """Return a tiny input of the model, or None if none is known."""
    device = device_of(root)
    if device.type == "meta":
        return None
    if getattr(root, "main_input_name", None) == "pixel_values":
        return {"pixel_values": _image(root, device)}
    dummy = getattr(root, "dummy_inputs", None)
    if isinstance(dummy, dict):
        given = {name: tensor.to(device) for name, tensor in dummy.items() if tensor is not None}
        if "ForSequenceClassification" in type(root).__name__ and root.config.is_encoder_decoder:
            # BART and its kin read the class at the end-of-sequence token, and fail without one.
            given = {"input_ids": torch.full((2, 5), root.config.eos_token_id, device=device)}
        return given | {"use_cache": False} | _encoder_states(root, device)
    if isinstance(root, nn.Sequential) and isinstance(first := root[0], nn.Linear):
        return torch.zeros(2, first.in_features, device=device, dtype=first.weight.dtype)
    return None


def _encoder_states(root: Any, device: torch.device) -> dict[str, Any]:
    """Return states in place of an encoder's, for a decoder without one: otherwise its cross-attention would never be called."""
    rows, takes = len(root.dummy_inputs["input_ids"]), inspect.signature(root.forward).parameters
    sites = site_table_of(root).by_name.get("cross.k", [])
    if not sites or "decoder_input_ids" in takes:
        return {}
    states = torch.zeros(rows, 2, sites[0].in_features, device=device, dtype=root.dtype)
    return {"encoder_hidden_states": states} if "encoder_hidden_states" in takes else {"encoder_outputs": (states,)}


def _image(root: Any, device: torch.device) -> torch.Tensor:
    """Return a black image [1, C, H, W] of the size that the model was made for."""
    config = getattr(root.config, "vision_config", root.config)
    size = config.image_size
    height, width = size if isinstance(size, list | tuple) else (size, size)
    return torch.zeros(1, config.num_channels, height, width, device=device, dtype=root.dtype)

"""What Graft uses of transformers and accelerate that they do not document.

Why: they have no public way to call a function of a model's own file, to initialise one module of a model, to choose how a block is
recomputed, or to tell on which device a module with offloaded weights computes.
Breaks: a renamed function of a model file raises, or is found by the proof of Graft's attention forwards; without
`_gradient_checkpointing_func` blocks would not be recomputed; without `_hf_hook` an offloaded model counts as one on the meta device.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from graft.architectures.layers import COMPUTES


def model_file_function(module: nn.Module, name: str) -> Any:
    """Return what the file that defines a module's class calls by a name, None if it has no such name.

    E.g. `apply_rotary_pos_emb` of transformers' modeling_falcon.py for a `FalconAttention`.
    """
    return getattr(sys.modules[type(module).__module__], name, None)


def initialise(root: Any, module: nn.Module) -> None:
    """Initialise the parameters of one module as its model does for a fresh one."""
    parameter: Any
    for parameter in module.parameters():
        parameter.__dict__.pop("_is_hf_initialized", None)  # transformers skips a parameter with this mark
    root._init_weights(module)


def is_checkpointed_layer(module: nn.Module) -> bool:
    """Whether a module is a block that transformers can recompute in backward."""
    from transformers.modeling_layers import GradientCheckpointingLayer

    return isinstance(module, GradientCheckpointingLayer)


def set_checkpointing(layer: Any, function: Callable[..., Any]) -> None:
    """Let a block in training mode run through a checkpointing function: function(forward, *args)."""
    layer.gradient_checkpointing = True
    layer._gradient_checkpointing_func = function


def clear_checkpointing(layer: nn.Module) -> None:
    """Undo `set_checkpointing`."""
    layer.__dict__.pop("gradient_checkpointing", None)
    layer.__dict__.pop("_gradient_checkpointing_func", None)


def checkpointing_function(layer: nn.Module) -> Any:
    """Return a block's checkpointing function, None if it has none."""
    return layer.__dict__.get("_gradient_checkpointing_func")


def device_of(module: nn.Module) -> torch.device:
    """Return where a module computes: its weights' device or, if they are offloaded, the device that accelerate's hook moves them to."""
    weight = next(module.parameters(), None)
    if weight is None:
        return torch.device("cpu")
    if hasattr(weight, COMPUTES):
        return getattr(weight, COMPUTES)[0]
    if weight.device.type != "meta":
        return weight.device
    hooks = (hook for child in module.modules() if (hook := getattr(child, "_hf_hook", None)) is not None)
    # A SequentialHook holds several hooks; one of them knows the device.
    devices = (getattr(each, "execution_device", None) for hook in hooks for each in getattr(hook, "hooks", (hook,)))
    found = next((device for device in devices if device), None)
    return weight.device if found is None else torch.device(found)


def has_device_hook(module: nn.Module) -> bool:
    """Whether accelerate moves the module's weights or inputs when it is called."""
    return hasattr(module, "_hf_hook")

"""The modes of a model in training: dropout of adapters and base, and gradient checkpointing.

The adapters' dropout is on; the base's own is off unless asked for. transformers recomputes a block (`GradientCheckpointingLayer`) only
while the block is in training mode, which would also turn on dropout that the block itself applies. So a checkpointed block is put into
training mode, and its checkpointed function runs it in the mode that the base has.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from graft.architectures.transformers_internals import (
    checkpointing_function,
    clear_checkpointing,
    is_checkpointed_layer,
    set_checkpointing,
)
from graft.architectures.walk import base_modules
from graft.errors import GraftError
from graft.injection.modes import evaluation_mode, set_modes
from graft.injection.state import state_of, unwrapped


def set_training(model: nn.Module, names: Sequence[str], base_dropout: bool = False) -> None:
    """Put these adapters alone into training mode, and the base only if its own dropout is wanted."""
    root, state = unwrapped(model), state_of(model)
    set_modes(root, state, base_dropout, names)
    for _, layer in base_modules(root):
        if checkpointing_function(layer) is not None:
            layer.training = True  # the block alone: its children keep the base's mode


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put the model into evaluation mode, without gradients, for a block of code; every module gets its mode back."""
    with evaluation_mode(model), torch.no_grad():
        yield


@contextmanager
def recomputing(model: nn.Module, base_dropout: bool = False) -> Iterator[None]:
    """Recompute every block in backward (non-reentrant gradient checkpointing). Raises `GraftError` for a model without such blocks."""
    layers = [layer for _, layer in base_modules(unwrapped(model)) if is_checkpointed_layer(layer)]
    if not layers:
        raise GraftError(
            f"{type(unwrapped(model)).__name__} has no blocks that can be recomputed: set train.gradient_checkpointing to false"
        )
    for layer in layers:
        set_checkpointing(layer, functools.partial(_checkpointed, layer, base_dropout))
    try:
        yield
    finally:
        for layer in layers:
            layer.training = False
            clear_checkpointing(layer)


def _checkpointed(layer: nn.Module, base_dropout: bool, function: Callable[..., Any], *args: Any) -> Any:
    """Run a block's function under gradient checkpointing, with the block in the base's own mode."""

    def run(*inputs: Any) -> Any:
        before, layer.training = layer.training, base_dropout
        try:
            return function(*inputs)
        finally:
            layer.training = before

    return checkpoint(run, *args, use_reentrant=False, preserve_rng_state=base_dropout)

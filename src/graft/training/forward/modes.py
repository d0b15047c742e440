"""The modes of a model in training. The adapters' dropout is on; the base's own is off unless asked for."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import nn

from graft.architectures.transformers_internals import checkpointing_function
from graft.architectures.walk import base_modules
from graft.injection.modes import evaluation_mode, set_modes
from graft.injection.state import state_of, unwrapped


def set_training(model: nn.Module, names: Sequence[str], base_dropout: bool = False) -> None:
    """Put these adapters alone into training mode, and the base only if its own dropout is wanted."""
    root, state = unwrapped(model), state_of(model)
    set_modes(root, state, base_dropout, names)
    for _, layer in base_modules(root):
        if checkpointing_function(layer) is not None:
            layer.training = True  # for transformers (see `activations.py`); its children keep the base's mode


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put the model into evaluation mode, without gradients, for a block of code; every module gets its mode back."""
    with evaluation_mode(model), torch.no_grad():
        yield

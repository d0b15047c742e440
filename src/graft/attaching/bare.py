"""A model without adapters, ready for forward contexts: the base itself trains, or runs flat batches."""

from __future__ import annotations

from torch import nn

from graft.architectures.transformers_internals import is_checkpointed_layer
from graft.architectures.walk import base_modules
from graft.injection.state import State, unwrapped
from graft.injection.substitution import KeepsContext, substitute


def keep_context(model: nn.Module) -> None:
    """Give a model the state that forward contexts need, and let its checkpointed blocks keep the context. Nothing else changes.

    The weights keep whether they require gradients; `save_pretrained` stays transformers' own.
    """
    root = unwrapped(model)
    if "graft_state" in root.__dict__:
        return
    state = root.__dict__["graft_state"] = State()
    state.sites(root)
    for _, module in base_modules(root):
        if is_checkpointed_layer(module):
            module.__dict__["graft_state"] = state
            substitute(module, KeepsContext)

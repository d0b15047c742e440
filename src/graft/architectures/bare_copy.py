"""Modules that are made without their constructor: a copy without adapters and hooks, and an instance with given attributes.

Why: an adapter that runs a frozen module again with other tensors must not run the adapters there again, and `copy.deepcopy` would copy
the weights. So the copy gets the attribute dictionaries of nn.Module by hand, with the same tensors in them.
Breaks: if torch keeps parameters, buffers, children or hooks under other attributes, or accelerate its forward; the contract tests of the
kind `full` then fail.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from typing import Any

from torch import nn

from graft.architectures.walk import CONTAINER, own_class

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def bare_copy(host: nn.Module) -> nn.Module:
    """Copy a module and its children. `__new__` skips the constructor, so nothing is allocated and every tensor is the host's own."""
    cls = own_class(host)
    copied: nn.Module = cls.__new__(cls)
    copied.__dict__.update(host.__dict__)
    copied.__dict__.update({name: OrderedDict() for name in _HOOKS})
    for name in ("forward", "_hf_hook", "_old_forward", "graft_state"):  # accelerate's hooks live on the instance
        copied.__dict__.pop(name, None)
    copied.__dict__["_parameters"] = dict(host._parameters)
    copied.__dict__["_buffers"] = dict(host._buffers)
    children = {name: child for name, child in host._modules.items() if name != CONTAINER}
    copied.__dict__["_modules"] = {name: child and bare_copy(child) for name, child in children.items()}
    return copied


def bare_instance(cls: type[nn.Module], attributes: Mapping[str, Any]) -> Any:
    """Make an instance of a class with these attributes and without parameters or children, to try out the forward of the class."""
    module = cls.__new__(cls)
    nn.Module.__init__(module)
    module.__dict__.update(attributes)
    return module

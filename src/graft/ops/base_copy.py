"""A twin of a frozen module: the same class and attributes, without the adapters and hooks that the module hosts.

Adapters that change a module's own parameters run its forward a second time with other tensors in their place; the twin is what they run.

Legend: p dotted name of a parameter below the module.
"""

from __future__ import annotations

import inspect
from collections import OrderedDict
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
from torch.func import functional_call

from graft.errors import GraftError

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


class BaseCopy:
    """A module to run with other tensors in place of its parameters. Kept outside of any module's own children."""

    def __init__(self, host: nn.Module) -> None:
        self.host, self.module = host, _copied(host)

    def names(self) -> dict[str, nn.Parameter]:
        """The host's own parameters by p, those of its children included, live; no adapter's."""
        return {name: p for name, p in self.host.named_parameters() if "graft" not in name.split(".")}

    def run(self, tensors: Mapping[str, Tensor], *args: Any) -> Tensor:
        """The host's forward with these tensors by p. Raises `GraftError` when it gives anything but one tensor."""
        for twin, host in zip(_own_modules(self.module), _own_modules(self.host), strict=True):
            if twin.training != host.training:
                twin.training = host.training
        buffers = {name: b for name, b in self.host.named_buffers() if "graft" not in name.split(".")}
        out = functional_call(self.module, {**buffers, **tensors}, args)
        if not isinstance(out, Tensor):
            raise GraftError(
                f"{type(self.module).__name__} gives a {type(out).__name__} and not one tensor: adapt the modules in it"
            )
        return out


def _own_modules(module: nn.Module) -> list[nn.Module]:
    """A module and those below it, without the containers of adapters."""
    return [each for name, each in module.named_modules() if "graft" not in name.split(".")]


def _copied(host: nn.Module) -> nn.Module:
    cls = getattr(type(host), "graft_base", type(host))
    twin: nn.Module = cls.__new__(cls)
    twin.__dict__.update(host.__dict__)
    twin.__dict__.update({name: OrderedDict() for name in _HOOKS})
    for name in ("forward", "_hf_hook", "_old_forward", "graft_state"):  # accelerate's hooks live on the instance
        twin.__dict__.pop(name, None)
    twin.__dict__["_parameters"] = dict(host._parameters)
    twin.__dict__["_buffers"] = dict(host._buffers)
    children = {name: child for name, child in host._modules.items() if name != "graft"}
    twin.__dict__["_modules"] = {name: child and _copied(child) for name, child in children.items()}
    return twin


def refuse_several_inputs(host: nn.Module) -> None:
    """Raises `GraftError` for a module whose forward needs more than one input: only the first reaches an adapter."""
    forward = getattr(type(host), "graft_base", type(host)).forward
    given = list(inspect.signature(forward).parameters.values())[1:]
    needed = [p.name for p in given if p.default is p.empty and p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    if len(needed) != 1:
        raise GraftError(
            f"{type(host).__name__} takes {', '.join(needed) or 'no fixed'} inputs, and full training runs a module again on one: "
            "name the layers and norms in it"
        )


def table_of(host: nn.Module) -> BaseCopy:
    """A twin of an embedding. Raises `GraftError` where its output is not linear in its table."""
    if getattr(host, "max_norm", None) is not None:
        raise GraftError(
            f"{type(host).__name__} limits the norm of its rows (max_norm), so a difference to them is not a difference of outputs"
        )
    return BaseCopy(host)

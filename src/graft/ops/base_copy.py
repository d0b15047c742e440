"""A frozen module that runs with other tensors in place of its parameters.

Adapters that change a module's own parameters run its forward a second time with other tensors in their place. They run a bare copy
(`architectures/bare_copy.py`), because a forward of the host itself would call the adapters again. The copy shares the host's parameters
and buffers.

Legend: p dotted name of a parameter below the module.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
from torch.func import functional_call

from graft.architectures.bare_copy import bare_copy
from graft.architectures.walk import base_modules, base_parameters, own_class
from graft.errors import GraftError


class BaseCopy:
    """A module to run with other tensors in place of its parameters. Its owner must not register it as a child module."""

    def __init__(self, host: nn.Module) -> None:
        self.host, self.module = host, bare_copy(host)

    def parameters(self) -> dict[str, nn.Parameter]:
        """Return the host's current parameters by name, including those of its children but not those of adapters."""
        return dict(base_parameters(self.host))

    def run(self, tensors: Mapping[str, Tensor], *args: Any) -> Tensor:
        """Run the host's forward with these tensors, by name. Raises `GraftError` if it returns anything but one tensor."""
        # `training` is a plain attribute, of which the copy holds its own, and buffers may be replaced after the copy was made.
        for (_, own), (_, host) in zip(base_modules(self.module), base_modules(self.host), strict=True):
            if own.training != host.training:
                own.training = host.training
        buffers = {name: b for name, b in self.host.named_buffers() if "graft" not in name.split(".")}
        out = functional_call(self.module, {**buffers, **tensors}, args)
        if not isinstance(out, Tensor):
            raise GraftError(
                f"{type(self.module).__name__} returns a {type(out).__name__} and not one tensor: adapt the modules in it"
            )
        return out


def require_one_input(host: nn.Module) -> None:
    """Raise `GraftError` for a module with a forward that needs more than one input, since only the first reaches an adapter."""
    forward = own_class(host).forward
    given = list(inspect.signature(forward).parameters.values())[1:]
    needed = [p.name for p in given if p.default is p.empty and p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    if len(needed) != 1:
        raise GraftError(
            f"full training runs a module again on its one input, but {type(host).__name__} needs "
            f"{', '.join(needed) or 'no input that has a name'}: name the layers and norms in it"
        )


def embedding_copy(host: nn.Module) -> BaseCopy:
    """Copy an embedding. Raises `GraftError` if its output is not linear in its table."""
    if getattr(host, "max_norm", None) is not None:
        raise GraftError(
            f"{type(host).__name__} limits the norm of its rows (max_norm), so its output is not linear in the table: choose other sites"
        )
    return BaseCopy(host)

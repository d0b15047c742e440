"""Visit the base's own modules and leave out those of adapters, so that the cost does not depend on the number of adapters."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from pathlib import Path

from torch import nn
from torch.distributed.fsdp import FSDPModule

from graft.seedling import FOLDER

CONTAINER = "graft"
"""The name of the submodule in which a module holds its adapters."""


def public_name(name: str) -> str:
    """Return a base's name as files for others carry it: a hub name or relative folder as it is, of an absolute folder its last part.

    An absolute path leads nowhere on another machine, and tells where its owner keeps things. The embedded base is called seedling.
    """
    path = Path(name)
    if path == FOLDER:
        return "seedling"
    return path.name if path.is_absolute() or name.startswith("~") else name


def base_modules(root: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield (path, module) of every module of the base, each once, in the order of `named_modules`, without containers of adapters."""
    seen: set[nn.Module] = set()
    todo: list[tuple[str, nn.Module]] = [("", root)]
    while todo:
        path, module = todo.pop()
        if module in seen:
            continue
        seen.add(module)
        yield path, module
        children = [
            (f"{path}.{name}" if path else name, child) for name, child in module._modules.items() if child is not None
        ]
        todo += [(name, child) for name, child in reversed(children) if name.rpartition(".")[2] != CONTAINER]


def base_submodules(root: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield the same without the root, which has no path."""
    return ((path, module) for path, module in base_modules(root) if path)


def base_parameters(root: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Yield (name, parameter) for every parameter of the base in the order of `named_parameters`, each once, without those of adapters."""
    seen: set[nn.Parameter] = set()
    for path, module in base_modules(root):
        for name, parameter in module._parameters.items():
            if parameter is not None and parameter not in seen:
                seen.add(parameter)
                yield f"{path}.{name}" if path else name, parameter


def own_class(module: nn.Module) -> type[nn.Module]:
    """Return the class that a module has without Graft."""
    return getattr(type(module), "graft_base", type(module))


def plain_class(module: nn.Module) -> type[nn.Module]:
    """Return the class that a module had before Graft, or FSDP2 under it, gave it another one."""
    return _without_parts(own_class(module))


@functools.cache
def _without_parts(cls: type[nn.Module]) -> type[nn.Module]:
    return next(each for each in cls.__mro__ if not issubclass(each, FSDPModule))

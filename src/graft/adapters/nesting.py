"""The configs and modules of an adapter, those inside composites included."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

from graft.adapters.base import AdapterConfig, AdapterModule
from graft.adapters.made_of_kinds import MadeOfKinds


def every_config(config: AdapterConfig) -> Iterator[AdapterConfig]:
    """Yield every config of an adapter: its parts and, after each, those inside it."""
    for part in config.parts():
        yield part
        for each in part.inner():
            yield from every_config(each)


def placed(config: AdapterConfig, sites: str | tuple[str, ...]) -> AdapterConfig:
    """Return a config, and what is inside it, at other sites."""
    inside = config.changed(lambda each: placed(each, sites)) if isinstance(config, MadeOfKinds) else config
    return inside.model_copy(update={"sites": sites})


def every_module(path: str, module: nn.Module) -> Iterator[tuple[str, AdapterModule]]:
    """Yield (path, module) of a module of an adapter and, after it, of those inside it."""
    if isinstance(module, AdapterModule):
        yield path, module
        for key, each in module.inner().items():
            yield from every_module(f"{path}.{key}", each)

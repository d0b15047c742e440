"""What the writers of other libraries' formats share: the adapter as they read it, and the folder as they fill it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from graft.architectures.walk import public_name
from graft.injection.state import Installed, State


@dataclass
class SiteAdapter:
    """The part of an adapter at one site: where it is installed, and its module."""

    installed: Installed
    module: Any

    @property
    def path(self) -> str:
        """The path of the module that hosts it."""
        return self.installed.site.module

    @property
    def config(self) -> Any:
        """The config that holds at this site."""
        return self.installed.config

    @property
    def features(self) -> slice | Tensor:
        """The output features of the host that it adapts: all, or a slice of a fused projection."""
        features = self.installed.site.features
        return slice(None) if features is None else features


def site_adapters(root: nn.Module, state: State, name: str) -> list[SiteAdapter]:
    """Every site at which an adapter is installed, with its module."""
    return [SiteAdapter(installed, installed.module) for installed in state.adapter(name).installs]


def base_name(root: nn.Module) -> str | None:
    """The hub name or folder that the base was loaded from, None if it was built in memory.

    An absolute folder below the current one is named from there, so that PEFT finds it from the same place; of another one only the last
    part is named (`public_name`).
    """
    name = str(getattr(getattr(root, "config", None), "_name_or_path", None) or "")
    if (
        public_name(name) != "seedling"
        and Path(name).is_absolute()
        and Path(name).is_relative_to(Path.cwd())
        and Path(name) != Path.cwd()
    ):
        return str(Path(name).relative_to(Path.cwd()))
    return public_name(name) if name else None


def is_shortened(root: nn.Module) -> bool:
    """Whether `base_name` names no more than the last part of the folder that the base was loaded from."""
    name = str(getattr(getattr(root, "config", None), "_name_or_path", None) or "")
    return (
        base_name(root) not in (name, None)
        and Path(name).expanduser().is_dir()
        and not Path(str(base_name(root))).is_dir()
    )


@dataclass
class Folder:
    """An adapter folder before it is written."""

    config: dict[str, Any] = field(default_factory=dict)
    """The fields of its config file."""
    tensors: dict[str, Tensor] = field(default_factory=dict)
    """Tensors by name; PEFT's writers leave out the prefix that PEFT puts before each (`with_prefix` adds it)."""
    unprefixed: dict[str, Tensor] = field(default_factory=dict)
    """Tensors that get no prefix."""
    files: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Further files by name: the fields of a `.json`, or the tensors of a `.safetensors`."""
    notes: list[str] = field(default_factory=list)
    """What was converted or left out, for the user to read."""

    def with_prefix(self, prefix: str) -> Folder:
        """Put the prefix before the names of `tensors`, add `unprefixed`, and detach everything. Returns itself."""
        found = {f"{prefix}{key}": tensor for key, tensor in self.tensors.items()} | self.unprefixed
        self.tensors = {key: tensor.detach() for key, tensor in found.items()}
        return self


Writer = Callable[[nn.Module, Sequence[SiteAdapter], Folder], None]
"""Adds the adapter's fields and tensors to a folder. Arguments: the base, the adapter at each of its sites, the folder."""

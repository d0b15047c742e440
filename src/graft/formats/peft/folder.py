"""What is written of an adapter as a PEFT folder: its seats as they are read, the fields and tensors as they come."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from graft.injection.state import Installed


@dataclass
class Held:
    """One seat of an adapter: where it sits, and its module."""

    installed: Installed
    module: Any

    @property
    def path(self) -> str:
        """The host's path."""
        return self.installed.site.module

    @property
    def config(self) -> Any:
        """The config at this site."""
        return self.installed.config


@dataclass
class Folder:
    """What is to be written: the config's fields, and tensors behind `base_model.model.`."""

    config: dict[str, Any] = field(default_factory=dict)
    tensors: dict[str, Tensor] = field(default_factory=dict)
    beside: dict[str, Tensor] = field(default_factory=dict)
    """Tensors with whole names of their own."""
    files: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Further files by name: fields of a `.json`, tensors of a `.safetensors`."""
    notes: list[str] = field(default_factory=list)
    """What was converted or left out on the way."""


Writer = Callable[[nn.Module, Sequence[Held], Folder], None]

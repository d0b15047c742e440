"""The adapters at one module, by what they do there."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, fields
from typing import Any

from torch import Tensor

from graft.adapters.base import Adapter
from graft.adapters.hooks import AttentionAdapter, EmbeddingAdapter, ExpertsAdapter


@dataclass(eq=False)
class HostedAdapter:
    """One adapter module at one site: its features of the output, and the input carried over from another module."""

    name: str
    adapter: Adapter
    features: slice | Tensor | None = None
    """The output features that the site is; None for all."""
    remote: bool = False
    """Whether the site's input lies in another module, which runs `before` and leaves x here."""
    x: Tensor | None = None
    """The input that the other module left in this forward pass."""

    @property
    def acts_before(self) -> bool:
        """Whether the adapter may change the input."""
        return type(self.adapter).before is not Adapter.before

    def source(self, x: Tensor) -> Tensor:
        """Return the site's input: the host's own x, or what the other module left."""
        if not self.remote or self.adapter.reads == "nothing":
            return x
        if self.x is None:
            raise RuntimeError(f"adapter '{self.name}': the sublayer's output came before its input")
        return self.x


@dataclass(eq=False)
class Hooks:
    """One table for each thing that an adapter can do at a module; each maps an adapter's name to its modules there."""

    before: dict[str, list[HostedAdapter]] = field(default_factory=dict)
    """Change the module's input."""
    send: dict[str, list[HostedAdapter]] = field(default_factory=dict)
    """Are at another module, which makes a sublayer's output; this one has the sublayer's input."""
    adapt: dict[str, list[HostedAdapter]] = field(default_factory=dict)
    """Change the module's output."""
    keys_values: dict[str, list[AttentionAdapter]] = field(default_factory=dict)
    """Give this attention module virtual tokens."""
    second_attention: dict[str, list[AttentionAdapter]] = field(default_factory=dict)
    """Add a second attention to this module's."""
    prompts: dict[str, list[EmbeddingAdapter]] = field(default_factory=dict)
    """Put virtual tokens before the sequence; this module owns the blocks."""
    experts: dict[str, list[ExpertsAdapter]] = field(default_factory=dict)
    """Change the experts' weights that this module holds."""

    def add(self, hook: str, name: str, adapter: Any) -> None:
        """Add an adapter's module to the table of a hook."""
        getattr(self, hook).setdefault(name, []).append(adapter)

    def pop(self, name: str) -> None:
        """Drop an adapter from every table."""
        for _, table in self.tables():
            table.pop(name, None)

    def rename(self, old: str, new: str) -> None:
        """Give an adapter another name in every table."""
        for _, table in self.tables():
            if old in table:
                table[new] = table.pop(old)
        for table in (self.before, self.send, self.adapt):
            for hosted in table.get(new, ()):
                hosted.name = new

    def of(self, name: str) -> Iterator[tuple[str, Any]]:
        """(hook, module) for everything that an adapter does here."""
        for hook, table in self.tables():
            for adapter in table.get(name, ()):
                yield hook, adapter

    def tables(self) -> Iterator[tuple[str, dict[str, Any]]]:
        """(hook, table) for every hook."""
        for each in fields(self):
            yield each.name, getattr(self, each.name)

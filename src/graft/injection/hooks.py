"""The tables of one module's adapters: one for each thing that an adapter can do there."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, fields
from typing import Any

from torch import Tensor

from graft.adapters.base import Adapter
from graft.adapters.hooks import AttentionAdapter, EmbeddingAdapter, ExpertsAdapter


@dataclass(eq=False)
class HostedAdapter:
    """One adapter module at one site: the output features that it changes, and the input, if that comes from another module."""

    name: str
    adapter: Adapter
    features: slice | Tensor | None = None
    """The output features of the site, for q, k or v of a fused projection; None for all."""
    remote: bool = False
    """Whether the site's input is that of another module, which runs `before` and leaves x here."""
    x: Tensor | None = None
    """The input that the other module left in this forward pass."""

    @property
    def acts_before(self) -> bool:
        """Whether the adapter has a `before`."""
        return self.adapter.acts_before

    def source(self, x: Tensor) -> Tensor:
        """Return the site's input: the host's own x, or what the other module left."""
        if not self.remote or self.adapter.reads == "nothing":
            return x
        if self.x is None:
            raise RuntimeError(
                f"adapter '{self.name}': the module with the sublayer's output ran before the one with its input"
            )
        return self.x


@dataclass(eq=False)
class Hooks:
    """Tables from an adapter's name to its modules, one for each thing that they do."""

    before: dict[str, list[HostedAdapter]] = field(default_factory=dict)
    """Adapters that change the module's input."""
    send: dict[str, list[HostedAdapter]] = field(default_factory=dict)
    """Adapters of a sublayer that has its input here and its output at another module, which hosts them."""
    adapt: dict[str, list[HostedAdapter]] = field(default_factory=dict)
    """Adapters that change the module's output."""
    keys_values: dict[str, list[AttentionAdapter]] = field(default_factory=dict)
    """Adapters that give this attention module virtual tokens."""
    second_attention: dict[str, list[AttentionAdapter]] = field(default_factory=dict)
    """Adapters that add a second attention to this module's."""
    prompts: dict[str, list[EmbeddingAdapter]] = field(default_factory=dict)
    """Adapters that put virtual tokens before the sequence. This module owns the blocks."""
    experts: dict[str, list[ExpertsAdapter]] = field(default_factory=dict)
    """Adapters that change the experts' weights in this module."""

    def add(self, hook: str, name: str, adapter: Any) -> None:
        """Add an adapter's module to a table."""
        getattr(self, hook).setdefault(name, []).append(adapter)

    def pop(self, name: str) -> None:
        """Remove an adapter from every table."""
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
        """Yield (table, module) for everything that an adapter does here."""
        for hook, table in self.tables():
            for adapter in table.get(name, ()):
                yield hook, adapter

    def tables(self) -> Iterator[tuple[str, dict[str, Any]]]:
        """Yield (name, table) of every table."""
        for each in fields(self):
            yield each.name, getattr(self, each.name)

"""Adapters that answer: each sampler has weights of its own, which do not move when training goes on.

They lie on the disk, and are attached when somebody samples from them. Only so many stay attached.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from pathlib import Path

from torch import nn

from graft.attaching.attach import detach
from graft.formats.loading import load
from graft.serving.tinker.places import adapter_name

MOST = 64
"""Samplers that stay attached while nobody samples from them."""


class Samplers:
    """The adapters of samplers on the base. It belongs to the engine thread."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self._attached: OrderedDict[str, None] = OrderedDict()
        self._used: Counter[str] = Counter()

    def take(self, folder: Path, owner: str) -> str:
        """Return the name of the adapter in a folder, attached; it stays until it is given back. owner: what the name is made of."""
        name = f"{adapter_name(owner)}-sampler"
        if name not in self._attached:
            load(self.model, folder, name=name)
            self._attached[name] = None
        self._attached.move_to_end(name)
        self._used[name] += 1
        self._make_room()
        return name

    def give_back(self, name: str) -> None:
        """Say that one who took an adapter needs it no longer."""
        self._used[name] -= 1
        self._make_room()

    def drop(self, owner: str) -> None:
        """Detach the adapter of a sampler that is over, unless somebody still samples from it."""
        name = f"{adapter_name(owner)}-sampler"
        if name in self._attached and not self._used[name]:
            self._detach(name)

    def _make_room(self) -> None:
        for name in [name for name in self._attached if not self._used[name]][: max(0, len(self._attached) - MOST)]:
            self._detach(name)

    def _detach(self, name: str) -> None:
        del self._attached[name], self._used[name]
        detach(self.model, name)

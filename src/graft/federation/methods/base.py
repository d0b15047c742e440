"""What a method of federated training says: what clients get, what they compute, and what the server makes of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Protocol

from graft.federation.messages import Tensors


@dataclass(frozen=True)
class Update:
    """What a client sent in a round."""

    client: str
    weight: float
    """Its share in an average; those of a round add up to 1."""
    tensors: Tensors
    text: str = ""
    number: int = 1
    """The round."""


class Method(Protocol):
    """A method, on the workplace of this process. The server keeps its state as tensors and nothing else."""

    exchanges: ClassVar[bool]
    """Whether anything travels."""

    def begin(self) -> Tensors:
        """The server's state before the first round."""
        ...

    def down(self, state: Tensors, number: int, client: str) -> Tensors:
        """What a client gets in the round with this number."""
        ...

    def work(self, got: Tensors, number: int, client: str) -> tuple[Tensors, str]:
        """Train as this client in this round; what it sends, and a text for the server. Raises `GraftError`."""
        ...

    def check(self, update: Update, state: Tensors) -> None:
        """Raise `GraftError` for an update that cannot be one: tensors that are missing, misshapen or not finite."""
        ...

    def aggregate(self, state: Tensors, updates: Sequence[Update]) -> tuple[Tensors, dict[str, float]]:
        """The state after a round, and numbers for the report.

        updates: of the clients in the order of their names, at least one. Each is read when it is looked at, so that not all are in memory.
        """
        ...

    def scores(self, state: Tensors) -> dict[str, float]:
        """Evaluate the global model of a state."""
        ...

    def publish(self, state: Tensors, folder: Path) -> Path:
        """Write the global model of a state into a folder, as an adapter or as a model; where it is."""
        ...

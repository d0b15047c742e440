"""No federation: every client trains an adapter of its own through all rounds. The scores are means over the clients."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar

from graft.federation.messages import Tensors
from graft.federation.methods.base import Update
from graft.federation.methods.parameters import Parameters
from graft.federation.publishing import publish
from graft.federation.workplace import mean_scores


class Local(Parameters):
    """The state holds each client's tensors under "client/name"; a client that was not chosen yet has none."""

    exchanges: ClassVar[bool] = False

    def begin(self) -> Tensors:
        return {}

    def down(self, state: Tensors, number: int, client: str) -> Tensors:
        return _own(state, client) or self.start

    def aggregate(self, state: Tensors, updates: Sequence[Update]) -> tuple[Tensors, dict[str, float]]:
        new = {f"{each.client}/{key}": tensor for each in updates for key, tensor in each.tensors.items()}
        return {**state, **new}, {}

    def scores(self, state: Tensors) -> dict[str, float]:
        return mean_scores([super(Local, self).scores(self.down(state, 0, client)) for client in self.place.clients])

    def publish(self, state: Tensors, folder: Path) -> Path:
        """Write each client's adapter as adapters/<client>."""
        for client in self.place.clients:
            self.put(self.down(state, 0, client))
            publish(self.place, folder, self.part.job.trainable.adapter, client)
        return folder / "adapters"


def _own(state: Tensors, client: str) -> Tensors:
    return {key.split("/", 1)[1]: each for key, each in state.items() if key.startswith(f"{client}/")}

"""Read a federation: its YAML with changes on top, the run that a client trains, and the terms that all have to agree on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from graft.config import RunConfig
from graft.config.document import Document, read_document
from graft.config.explaining import explain
from graft.config.federation import AverageMethod, ClientsConfig, FederationConfig
from graft.config.methods import AdapterMethod, FullMethod, MeZOMethod
from graft.config.run import as_written
from graft.config.train import TrainConfig
from graft.data.splits import validation_source
from graft.errors import GraftError

A_FEDERATION = "a federation must be a mapping with base, data, method, local and, for most methods, adapter"


@dataclass(frozen=True)
class Federation:
    """A federation as it was given."""

    name: str
    config: FederationConfig
    document: Document

    def adapter_of(self, number: int) -> Any:
        """The adapter of the client with this number; None where the base trains."""
        turns = self.config.clients.adapters
        return turns[number % len(turns)] if turns else self.config.adapter

    def run_of(self, adapter: Any, seed: int) -> RunConfig:
        """The run that a client trains in a round."""
        config, local, method = self.config, self.config.local, self.config.method
        trained = AdapterMethod() if config.parts is None else FullMethod(parts=config.parts)
        if not config.gradients:
            trained = MeZOMethod(epsilon=method.epsilon, parts=config.parts)  # pyright: ignore[reportAttributeAccessIssue]
        try:
            train = TrainConfig(
                method=trained, steps=local.steps, batch_size=local.batch_size, lr=local.lr, optimizer=local.optimizer,
                clip=local.clip, token_budget=local.token_budget, schedule="constant", seed=seed,
            )  # fmt: skip
            return RunConfig(base=config.base, adapter=adapter, data=config.data, train=train)
        except ValidationError as error:
            raise GraftError("\n".join(explain(error, self.document, RunConfig))) from error

    @property
    def terms(self) -> dict[str, Any]:
        """What the server and all clients have to agree on."""
        config, method = self.config, self.config.method
        unlike = isinstance(method, AverageMethod) and method.aggregate != "naive"
        return {
            "method": method.model_dump(mode="json"),
            "local": config.local.model_dump(mode="json", exclude={"token_budget"}),
            "data": config.data.model_dump(
                mode="json", include={"task", "template", "system", "max_length", "train_on"}
            ),
            "seed": config.seed,
            "adapter": None if unlike else said(config.adapter),
        }

    def without_clients(self) -> Federation:
        """The federation for a server that has no rows of clients: what it evaluates on stands in for them.

        Raises `GraftError` where rows to evaluate on are held out of the clients'.
        """
        config = self.config
        if validation_source(config.data) is None:
            raise GraftError(
                "data.validation holds rows out of data.train, which are the clients': name a data set of the server's own to evaluate on"
            )
        data = config.data.model_copy(update={"train": config.data.validation})
        clients = ClientsConfig(adapters=config.clients.adapters)
        return replace(self, config=config.model_copy(update={"data": data, "clients": clients}))

    @property
    def known_as(self) -> dict[str, Any]:
        """What the federation is known by: everything that its results depend on."""
        return self.document.data


def read_federation(source: str | Path | Mapping[str, Any], changes: Sequence[str] = ()) -> Federation:
    """Read a federation from a YAML file or a mapping. Raises a `GraftError` that lists every mistake."""
    document = read_document(source, A_FEDERATION)
    document.change(changes)
    try:
        config = FederationConfig.model_validate(document.data)
    except ValidationError as error:
        raise GraftError("\n".join(explain(error, document, FederationConfig))) from error
    return Federation("federation" if isinstance(source, Mapping) else Path(source).stem, config, document)


def said(adapter: Any) -> Any:
    """Return an adapter as JSON values with the fields that the user set: some kinds ask which ones were."""
    if not hasattr(adapter, "kind"):  # a preset, or none
        return as_written(adapter)
    return {"kind": adapter.kind, **adapter.model_dump(mode="json", exclude_unset=True)}

"""The YAML of a federation: a base, what trains on it and how, the clients, and the rounds."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BeforeValidator, Discriminator, Field, model_validator

from graft.config.base import BaseConfig
from graft.config.by_name import named
from graft.config.data import DataConfig
from graft.config.methods import Parts
from graft.config.optimizers import AnyOptimizer
from graft.config.run import parse_adapter
from graft.config.section import Section

if TYPE_CHECKING:
    from graft.adapters.base import AdapterConfig
else:  # see `graft.config.run`
    AdapterConfig = Any

AnyAdapter = Annotated[AdapterConfig, BeforeValidator(parse_adapter)]


class KSeedMethod(Section):
    """FedKSeed (Qin et al. 2024, arXiv 2312.06353): clients send slopes along noise from a pool of seeds, never weights."""

    kind: Literal["fedkseed", "fedkseed-pro"] = "fedkseed"
    """fedkseed draws seeds uniformly; fedkseed-pro prefers those whose slopes were large."""
    seeds: int = Field(default=4096, ge=1, le=2**16)
    """Seeds in the pool, the paper's K."""
    epsilon: float = Field(default=5e-4, gt=0)
    """How far the parameters move along the noise for the two forward passes of a step."""
    parts: Parts | None = None
    """Which parts of the base train: all, or names as under `sites` of an adapter. null: the adapter, or all where there is none."""


class AverageMethod(Section):
    """FedAvg (McMahan et al. 2017, arXiv 1602.05629) of adapters that are trained by gradients."""

    kind: Literal["fedavg"] = "fedavg"
    """fedavg"""
    aggregate: Literal["auto", "differences", "stack", "naive"] = "auto"
    """What the server makes of the adapters. differences: the average of what each adds to the weights, exactly, though ranks and kinds
    differ. stack: the same of LoRAs, with the factors of all clients and rounds side by side, until a layer's weight is smaller. naive: the
    averages of their tensors, by name, which for a LoRA is not the average of what they compute; all have the same adapter. auto:
    differences where every kind has them, else naive."""
    rank: int | None = Field(default=None, ge=1)
    """With differences: the rank of the LoRA that approximates the average, which is what clients download. null keeps the average as it
    is, which is exact and as large as the weights."""


class FedZOMethod(Section):
    """FedZO (Fang et al. 2022, arXiv 2201.09531): clients step along noise of their own, as MeZO does, and send all parameters."""

    kind: Literal["fedzo"] = "fedzo"
    """fedzo"""
    epsilon: float = Field(default=5e-4, gt=0)
    """How far the parameters move along the noise for the two forward passes of a step."""
    parts: Parts | None = None
    """As for fedkseed."""


class FerretMethod(Section):
    """Ferret (Shu et al. 2025, arXiv 2409.06277): clients are trained by gradients, and send the change of all parameters as coordinates on
    random bases that everybody draws again."""

    kind: Literal["ferret"] = "ferret"
    """ferret"""
    block: int = Field(default=64, ge=1)
    """Values that share a coordinate: so many times less travels. What is rebuilt is right on average, and noise with about the square
    root of `block` times the size of the change, so a larger block wants a lower local.lr. 1 sends the change as it is."""
    parts: Parts | None = None
    """As for fedkseed."""


class LocalMethod(Section):
    """No federation, to compare with: every client trains an adapter of its own through all rounds."""

    kind: Literal["local"] = "local"
    """local"""


FEDERATED: dict[str, type[Section]] = {
    "fedkseed": KSeedMethod,
    "fedkseed-pro": KSeedMethod,
    "fedavg": AverageMethod,
    "fedzo": FedZOMethod,
    "ferret": FerretMethod,
    "local": LocalMethod,
}
FederatedMethod = KSeedMethod | AverageMethod | FedZOMethod | FerretMethod | LocalMethod
AnyFederated = Annotated[Annotated[FederatedMethod, Discriminator("kind")], BeforeValidator(named(FEDERATED))]


class ClientsConfig(Section):
    """Who the clients are, and which rows of data.train each one has."""

    split: Literal["files", "dirichlet"] = "files"
    """files: each file of data.train is a client, named after it. dirichlet: the rows are dealt by a column, so that clients have unlike
    shares of its values."""
    count: int | None = Field(default=None, ge=1)
    """For dirichlet: the number of clients."""
    label: str | None = None
    """For dirichlet: the column whose values the clients have unlike shares of."""
    alpha: float | None = Field(default=None, gt=0)
    """For dirichlet: the smaller, the less alike are the clients; null is 0.5."""
    least: int | None = Field(default=None, ge=1)
    """For dirichlet: the fewest rows of a client; null is 2."""
    adapters: list[AnyAdapter] = Field(default_factory=list)
    """Adapters that the clients have in turn, in place of `adapter`: unlike ranks and kinds in one federation."""

    @model_validator(mode="after")
    def _settings_of_its_split(self) -> ClientsConfig:
        if self.split == "dirichlet":
            for key in ("count", "label"):
                if getattr(self, key) is None:
                    raise ValueError(f"clients.split dirichlet needs clients.{key}")
            return self
        for key in ("count", "label", "alpha", "least"):
            if getattr(self, key) is not None:
                raise ValueError(
                    f"clients.{key} has no effect with clients.split files: remove it, or set clients.split to dirichlet"
                )
        return self


class LocalConfig(Section):
    """What a client does in a round."""

    steps: int = Field(default=200, ge=1)
    """Steps of a round."""
    batch_size: int = Field(default=1, ge=1)
    """Samples of a step."""
    lr: float = Field(gt=0)
    """Learning rate, the same through all rounds. FedKSeed: that of the server too."""
    optimizer: AnyOptimizer = None
    """The optimiser of methods with gradients, as train.optimizer; its state begins anew in every round. null is adamw."""
    clip: float | None = Field(default=None, gt=0)
    """Maximum norm of a step's gradient, or of its slope; null does not clip."""
    token_budget: int = Field(default=4096, ge=1)
    """Tokens per forward pass. Changes memory, not results."""


class RoundEvalConfig(Section):
    """How the global model is evaluated, on data.validation."""

    every: int = Field(default=1, ge=1)
    """Rounds between evaluations; the last round is always evaluated."""
    answers: int | None = Field(default=None, ge=1)
    """Validation questions that the model answers, for ROUGE-L; null measures the loss alone."""
    max_new_tokens: int = Field(default=64, ge=1)
    """Maximum length of an answer, in tokens."""


class FederationConfig(Section):
    """Clients that train one model together without showing their data."""

    base: BaseConfig
    """The base, the same at every client."""
    adapter: AnyAdapter | None = None
    """What trains, as in a run; null where the method trains the base itself."""
    data: DataConfig
    """The data: rows of the clients (train), and what the server evaluates on (validation)."""
    method: AnyFederated
    """fedkseed, fedkseed-pro, fedavg, fedzo, ferret or local, or a mapping with this kind and its settings."""
    clients: ClientsConfig = Field(default_factory=ClientsConfig)
    """The clients."""
    local: LocalConfig
    """What a client does in a round."""
    rounds: int = Field(default=40, ge=1)
    """Number of rounds."""
    fraction: float = Field(default=1.0, gt=0, le=1)
    """Share of the clients that take part in a round, at least one; drawn anew for each."""
    weights: Literal["rows", "equal"] = "rows"
    """How much a client counts in an average: by its number of rows, or all alike."""
    timeout: float = Field(default=600.0, gt=0)
    """Seconds until a client that has sent nothing is left out of a round. In one process clients cannot be late."""
    eval: RoundEvalConfig = Field(default_factory=RoundEvalConfig)
    """Evaluation of the global model."""
    seed: int = Field(default=0, ge=0, lt=2**63)
    """Seed of everything: dealing, choosing clients, the pool, initial values, the clients' order of data."""

    @property
    def parts(self) -> Any:
        """Which parts of the base train; None where an adapter does."""
        if self.adapter is not None or isinstance(self.method, AverageMethod | LocalMethod):
            return None
        return "all" if self.method.parts is None else self.method.parts

    @property
    def gradients(self) -> bool:
        """Whether clients run backward passes."""
        return isinstance(self.method, AverageMethod | FerretMethod | LocalMethod)

    @model_validator(mode="after")
    def _something_trains(self) -> FederationConfig:
        kind, adapters = self.method.kind, self.clients.adapters
        if isinstance(self.method, AverageMethod | LocalMethod) and self.adapter is None and not adapters:
            raise ValueError(f"missing key 'adapter': method {kind} trains adapters. Name a kind, such as lora")
        if self.adapter is not None and getattr(self.method, "parts", None) is not None:
            raise ValueError(
                f"method.parts trains the base itself, so an adapter has no use with {kind}: remove one of the two"
            )
        if adapters and self.adapter is not None:
            raise ValueError("clients.adapters stands in place of adapter: remove one of the two")
        if adapters and not (isinstance(self.method, AverageMethod) and self.method.aggregate != "naive"):
            raise ValueError(
                "clients.adapters gives clients unlike adapters, which fedavg on differences alone can average: set adapter, or that method"
            )
        if self.local.optimizer is not None and not self.gradients:
            raise ValueError(f"local.optimizer has no effect with method {kind}, whose steps go along noise: remove it")
        return self

    @model_validator(mode="after")
    def _settings_have_an_effect(self) -> FederationConfig:
        method = self.method
        if isinstance(method, AverageMethod) and method.rank is not None and method.aggregate in ("stack", "naive"):
            raise ValueError(
                f"method.rank is for averages of differences, and method.aggregate is {method.aggregate}: remove one of the two"
            )
        if isinstance(method, KSeedMethod) and method.seeds < self.local.steps:
            raise ValueError(
                f"method.seeds is {method.seeds}, fewer than the {self.local.steps} local.steps: a client would repeat itself. Raise "
                "seeds, or take fewer steps"
            )
        if self.eval.answers is not None and not self.data.validation:
            raise ValueError("eval.answers has no effect without validation data: set data.validation")
        if self.data.task == "preference":
            raise ValueError("data.task preference has no place in a federation: clients learn answers or labels")
        if self.eval.answers is not None and self.data.task != "causal":
            raise ValueError(f"eval.answers is for data.task causal, whose answers are written; it is {self.data.task}")
        if self.base.quantize is not None and self.parts is not None:
            raise ValueError("base.quantize makes the weights too coarse to train: remove it, or train an adapter")
        return self

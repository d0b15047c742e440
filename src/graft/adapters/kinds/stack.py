"""Several adapters under one name: each part at its own sites, and parts that share a site in the order written.

Examples are AdapterH (series before gate and up, series after down) and MAM (prefix on attention, parallel on the MLP).
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from pydantic import Field, field_validator

from graft.adapters.base import AdapterConfig
from graft.architectures.site import SiteType
from graft.errors import GraftError


class Stack(AdapterConfig):
    """Several adapters that live, train, save and route as one."""

    takes: ClassVar[frozenset[SiteType]] = frozenset(
        {"linear", "sublayer", "attention", "embedding", "norm", "experts", "other"}
    )
    suits = "Kinds that complement each other under one name: prefix and parallel (MAM), or LoRA and the rows of new tokens."

    kind: Literal["stack"] = "stack"
    adapters: tuple[AdapterConfig, ...] = Field(min_length=1)
    """The parts. In YAML, a plain list in place of the adapter means the same."""
    sites: str | tuple[str, ...] = ()
    """Unused: each part names its own sites."""

    @field_validator("adapters", mode="before")
    @classmethod
    def _parse(cls, value: Any) -> tuple[AdapterConfig, ...]:
        from graft.adapters.parsing import parse

        if not isinstance(value, list | tuple):
            raise GraftError(f"`adapters` must be a list of adapters; given: {value!r}")
        configs = [parse(part) for part in value]
        if presets := [config for config in configs if not isinstance(config, AdapterConfig)]:
            raise GraftError(
                f"a stack takes adapters, but not presets (given: {presets[0].preset}): write the preset's adapters out"
            )
        return tuple(part for config in configs if isinstance(config, AdapterConfig) for part in config.parts())

    @field_validator("sites")
    @classmethod
    def _no_sites(cls, value: str | tuple[str, ...]) -> str | tuple[str, ...]:
        if value:
            raise GraftError(f"a stack has no sites of its own (given: {value!r}): set `sites` in each of its adapters")
        return value

    @property
    def starts_as_identity(self) -> bool:
        return all(part.starts_as_identity for part in self.adapters)

    @property
    def folds(self) -> bool:
        return all(part.folds for part in self.adapters)

    @property
    def learns_bias(self) -> bool:
        return any(part.learns_bias for part in self.adapters)

    @property
    def needs_gradients(self) -> bool:
        return any(part.needs_gradients for part in self.adapters)

    def collapsed(self) -> Stack:
        return self.model_copy(update={"adapters": tuple(part.collapsed() for part in self.adapters)})

    def tokenised(self, tokenizer: Any) -> Stack:
        return self.model_copy(update={"adapters": tuple(part.tokenised(tokenizer) for part in self.adapters)})

    @classmethod
    def example(cls) -> dict[str, Any]:
        return {"kind": "stack", "adapters": [{"kind": "prefix", "tokens": 30}, {"kind": "parallel", "sites": "mlp"}]}

    def parts(self) -> tuple[AdapterConfig, ...]:
        return self.adapters

    def model_dump(self, **options: Any) -> dict[str, Any]:
        return {"kind": "stack", "adapters": [part.model_dump(**options) for part in self.adapters]}

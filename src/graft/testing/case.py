"""A case of the contract: one adapter config on one tiny base."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from graft.adapters.base import AdapterConfig
from graft.adapters.nesting import every_config
from graft.adapters.parsing import parse
from graft.adapters.presets import Preset
from graft.attaching.attach import attach
from graft.attaching.parameters import parameters
from graft.injection.state import state_of
from graft.testing.bases import CAUSAL, ids, logits, pristine, site_names, tiny_base

NOISE = {"t5": 0.1}
"""How far `attached` moves an adapter from its start, where it is not 0.2: T5 does not scale its scores down."""


class DoesNotApply(Exception):
    """A promise says nothing about this case. The message says why."""


class Process(Protocol):
    """Another process that loads saved adapters (fresh_process.py)."""

    def outputs(self, case: Case) -> tuple[Tensor, Tensor]:
        """Return a case's logits in this process and in the other one."""
        ...


@dataclass(frozen=True)
class Case:
    """One adapter config on one family."""

    family: str
    variant: str
    """A short name for the config."""
    spec: Any
    """The adapter: a config, or a mapping, a list or a preset's name as YAML has them. Or a function of the family's name that returns one
    of these, for a kind that refers to trained adapters."""
    process: Process | None = field(default=None, compare=False, repr=False)
    """The process that loads this case's saved adapter together with those of other cases. None: it gets one of its own."""

    @property
    def id(self) -> str:
        """The name that pytest and the report print."""
        return f"{self.family}-{self.variant}"

    @property
    def adapter(self) -> Any:
        """The adapter on this family."""
        return self.spec(self.family) if callable(self.spec) else self.spec

    @property
    def config(self) -> AdapterConfig:
        """The config as it holds on this family (presets resolved)."""
        parsed = parse(self.adapter)
        return parsed.resolve(site_names(self.family)) if isinstance(parsed, Preset) else parsed

    @property
    def causal(self) -> bool:
        """Whether the family generates from a prompt."""
        return self.family.partition("-")[0] in CAUSAL

    @property
    def quantised(self) -> bool:
        """Whether the base holds its linear layers in few bits."""
        return "-" in self.family

    @property
    def missing_sites(self) -> list[str]:
        """The site names that the kind declares as needed and the family does not have."""
        return sorted({name for part in every_config(self.config) for name in part.needs} - site_names(self.family))

    def needs_causal(self) -> None:
        """Raise `DoesNotApply` on a family that does not generate from a prompt."""
        if not self.causal:
            raise DoesNotApply(f"{self.family} does not generate from a prompt")

    def attached(
        self,
        *names: str,
        attention: str | None = None,
        dtype: torch.dtype = torch.float32,
        fresh: bool = False,
        layers: int = 2,
    ) -> Any:
        """Return a base with this adapter under each name (default "a"), in evaluation mode; the first one is active.

        Each adapter has weights of its own, as after training; fresh: leave them as a new adapter has them.
        """
        model = tiny_base(self.family, attention, dtype, layers=layers)
        with torch.random.fork_rng():
            torch.manual_seed(3)
            attach(model, {name: self.adapter for name in names or ("a",)})
        if not fresh:
            for number, name in enumerate(names or ("a",)):
                randomise(model, name, number, NOISE.get(self.family.partition("-")[0], 0.2))
        return model

    def base_logits(self, inputs: Tensor) -> Tensor:
        """Return what the plain base computes [B, L, V]."""
        return logits(pristine(self.family), inputs)

    def shows(self, model: nn.Module) -> bool:
        """Whether the active adapter changes the output by more than rounding."""
        return not torch.allclose(logits(model, ids()), self.base_logits(ids()), atol=1e-3)


def randomise(model: nn.Module, name: str, seed: int = 0, size: float = 0.2) -> None:
    """Move every parameter of an adapter away from its start, as training would."""
    generator = torch.Generator().manual_seed(1000 + seed)
    with torch.no_grad():
        for _, parameter in parameters(model, name):
            parameter.add_(torch.randn(parameter.shape, generator=generator).to(parameter) * size)


def active(model: nn.Module) -> Any:
    """Return the name of the active adapter, or one entry per row; None for the bare base."""
    return state_of(model).current.rows

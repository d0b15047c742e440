"""The methods of training by name: what is trained, and by which rule of stepping. One section for each, with `kind` to tell them apart."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import AfterValidator, BeforeValidator, Discriminator, Field

from graft.config.by_name import named
from graft.config.section import Section

Rule = Literal["gradients", "in_backward", "stack", "zeroth"]
"""How a step comes from losses to an update: see `graft.training.updates.rules`."""


def _not_empty(value: str | tuple[str, ...]) -> str | tuple[str, ...]:
    if not value or (isinstance(value, str) and not value.strip()):
        raise ValueError("must name parts of the base, such as all or attn mlp")
    return value


Parts = Annotated[str | Annotated[tuple[str, ...], Field(strict=False)], AfterValidator(_not_empty)]
"""Which parts of the base train: `all`, or names as under `sites` of an adapter (attn.q, mlp, layer@8-15, embed, re:PATTERN)."""


Update = Literal["after", "in_backward"]


class AdapterMethod(Section):
    """An adapter on the frozen base, trained by its gradients."""

    rule: ClassVar[Rule] = "gradients"
    parts: ClassVar[None] = None

    kind: Literal["adapter"] = "adapter"
    """adapter"""


class FullMethod(Section):
    """The base itself, or parts of it, trained by gradients and saved as an ordinary model."""

    kind: Literal["full"] = "full"
    """full"""
    parts: Parts = "all"
    """Which parts of the base train: all, or names as under `sites` of an adapter, such as attn mlp, layer@8-15 or embed head."""
    update: Update = "after"
    """When parameters change. after: when all gradients are there. in_backward: each as soon as its gradient is there, which is then freed;
    it needs train.clip: null, and a train.token_budget that holds a whole step."""
    rounding: Literal["nearest", "stochastic"] = "nearest"
    """How weights of a base in bfloat16 are rounded after a step. nearest loses every update below half a step of the format; stochastic
    keeps them on average, takes each step parameter by parameter, and holds the optimiser's state in float32."""

    @property
    def rule(self) -> Rule:
        """The rule of stepping."""
        return "gradients" if self.update == "after" else "in_backward"


class QFTMethod(Section):
    """QFT (Li et al. 2023, arXiv 2310.07147): the base itself with weights, gradients and momenta in 8 bits, trained by Lion and saved as
    an ordinary model. Weights are rounded stochastically, without which updates below half a step of their grid would be lost."""

    kind: Literal["qft"] = "qft"
    """qft"""
    parts: Parts = "all"
    """Which parts of the base train: all, or names as under `sites` of an adapter."""
    outliers: float = Field(default=0.01, ge=0, lt=0.5)
    """Share of each matrix, its largest values, that is kept in float32; chosen anew once per epoch."""
    rounding: Literal["stochastic", "nearest"] = "stochastic"
    """How weights are rounded to their grid; nearest loses every update below half a step."""
    update: Update = "after"
    """When weights change. after: when all gradients are on the stack, clipped by their norm. in_backward: each as soon as its gradient is
    there; it needs train.clip: null, and a train.token_budget that holds a whole step."""

    @property
    def rule(self) -> Rule:
        """The rule of stepping."""
        return "stack" if self.update == "after" else "in_backward"


class MeZOMethod(Section):
    """MeZO (Malladi et al. 2023, arXiv 2305.17333): the slope of the loss along random noise, from two forward passes, in place of a
    gradient. It takes no backward pass and keeps no activations; it wants many more steps, a large batch and a constant learning rate."""

    rule: ClassVar[Rule] = "zeroth"

    kind: Literal["mezo"] = "mezo"
    """mezo"""
    parts: Parts | None = None
    """Which parts of the base train: all, or names as under `sites` of an adapter; null trains an adapter."""
    epsilon: float = Field(default=1e-3, gt=0)
    """How far the parameters move along the noise, which has a standard deviation of 1, for the two passes."""
    directions: int = Field(default=1, ge=1)
    """Directions of noise per step, whose slopes are averaged (the paper's n); each takes two passes."""
    restore: Literal["copy", "subtract"] = "copy"
    """How parameters come back after the two passes. copy: bit for bit, from a copy. subtract: without a copy, by subtracting the noise
    again, which leaves differences of rounding."""


METHODS: dict[str, type[Section]] = {"adapter": AdapterMethod, "full": FullMethod, "qft": QFTMethod, "mezo": MeZOMethod}

MethodConfig = AdapterMethod | FullMethod | QFTMethod | MeZOMethod
AnyMethod = Annotated[Annotated[MethodConfig, Discriminator("kind")], BeforeValidator(named(METHODS))]

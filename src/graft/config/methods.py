"""The methods of training by name: what is trained, and by which rule of stepping. One section for each, with `kind` to tell them apart."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import BeforeValidator, Discriminator, Field

from graft.config.by_name import named
from graft.config.section import Section

Rule = Literal["gradients", "zeroth"]
"""How a step comes from losses to an update: see `graft.training.updates.rules`."""


class AdapterMethod(Section):
    """An adapter on the frozen base, trained by its gradients."""

    rule: ClassVar[Rule] = "gradients"

    kind: Literal["adapter"] = "adapter"
    """adapter"""


class MeZOMethod(Section):
    """MeZO (Malladi et al. 2023, arXiv 2305.17333): the slope of the loss along random noise, from two forward passes, in place of a
    gradient. It takes no backward pass and keeps no activations; it wants many more steps, a large batch and a constant learning rate."""

    rule: ClassVar[Rule] = "zeroth"

    kind: Literal["mezo"] = "mezo"
    """mezo"""
    epsilon: float = Field(default=1e-3, gt=0)
    """How far the parameters move along the noise, which has a standard deviation of 1, for the two passes."""
    directions: int = Field(default=1, ge=1)
    """Directions of noise per step, whose slopes are averaged (the paper's n); each takes two passes."""
    restore: Literal["copy", "subtract"] = "copy"
    """How parameters come back after the two passes. copy: bit for bit, from a copy. subtract: without a copy, by subtracting the noise
    again, which leaves differences of rounding."""


METHODS: dict[str, type[Section]] = {"adapter": AdapterMethod, "mezo": MeZOMethod}

MethodConfig = AdapterMethod | MeZOMethod
AnyMethod = Annotated[Annotated[MethodConfig, Discriminator("kind")], BeforeValidator(named(METHODS))]

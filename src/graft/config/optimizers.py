"""The optimisers by name: one section for each family, with `kind` to tell them apart.

A setting that is null takes its value from the key of the same name under `train`, if that is set, else the optimiser's usual one.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import AfterValidator, BeforeValidator, Discriminator, Field, model_validator

from graft.config.by_name import named
from graft.config.section import Section

LARGEST = 1e38
"""Largest learning rate, weight decay and epsilon: torch refuses to step with more than float32 holds."""


def _below_one(value: tuple[float, float] | None) -> tuple[float, float] | None:
    if value is not None and not all(0 <= beta < 1 for beta in value):
        raise ValueError("must be two numbers, each at least 0 and below 1")
    return value


Betas = Annotated[tuple[float, float] | None, Field(strict=False), AfterValidator(_below_one)]


class AdamWConfig(Section):
    """AdamW (Loshchilov and Hutter 2019, arXiv 1711.05101), also with a state of 8 bits (Dettmers et al. 2022, arXiv 2110.02861)."""

    kind: Literal["adamw", "adamw-8bit", "paged-adamw", "paged-adamw-8bit"] = "adamw"
    """adamw: torch's own, with a state in the parameters' format. adamw-8bit: bitsandbytes', with a state of 8 bits for tensors of 4,096
    values and more. paged-: bitsandbytes' with a state that moves to host memory when the GPU is full; on a CPU nothing needs to move."""
    betas: Betas = None
    """Decay rates of the first and second moment; null is train.betas, or else [0.9, 0.999]."""
    eps: float | None = Field(default=None, gt=0, le=LARGEST)
    """What is added to the root of the second moment; null is train.eps, or else 1e-8."""
    weight_decay: float | None = Field(default=None, ge=0, le=LARGEST)
    """Decoupled weight decay; null is train.weight_decay, or else 0."""


class LionConfig(Section):
    """Lion (Chen et al. 2023, arXiv 2302.06675): the sign of an averaged gradient. It wants a learning rate 3 to 10 times below AdamW's."""

    kind: Literal["lion", "lion-8bit"] = "lion"
    """lion: Graft's own, with one moment in the parameters' format. lion-8bit: bitsandbytes', with 8 bits for tensors of 4,096 values and
    more."""
    betas: Betas = None
    """Weights of the old average in the update and in the new average; null is train.betas, or else [0.9, 0.99]."""
    weight_decay: float | None = Field(default=None, ge=0, le=LARGEST)
    """Decoupled weight decay; null is train.weight_decay, or else 0."""


class AdafactorConfig(Section):
    """Adafactor (Shazeer and Stern 2018, arXiv 1804.04235) of transformers, with the learning rate of `train.lr` and its schedule."""

    kind: Literal["adafactor"] = "adafactor"
    """adafactor"""
    decay_rate: float = Field(default=-0.8, lt=0)
    """Exponent of the step in the second moment's decay rate, 1 - step ** decay_rate."""
    clip_threshold: float = Field(default=1.0, gt=0)
    """Largest root mean square of one tensor's update, before the learning rate."""
    beta1: float | None = Field(default=None, ge=0, lt=1)
    """Decay rate of a first moment; null keeps none."""
    weight_decay: float | None = Field(default=None, ge=0, le=LARGEST)
    """Decoupled weight decay; null is train.weight_decay, or else 0."""


class SGDConfig(Section):
    """Stochastic gradient descent of torch."""

    kind: Literal["sgd"] = "sgd"
    """sgd"""
    momentum: float = Field(default=0.0, ge=0, lt=1)
    """Weight of the old average of gradients."""
    nesterov: bool = False
    """Nesterov's form of momentum."""
    weight_decay: float | None = Field(default=None, ge=0, le=LARGEST)
    """Weight decay, which is added to the gradient; null is train.weight_decay, or else 0."""

    @model_validator(mode="after")
    def _nesterov_needs_momentum(self) -> SGDConfig:
        if self.nesterov and not self.momentum:
            raise ValueError("nesterov has no effect without momentum: set momentum, for example 0.9")
        return self


OPTIMIZERS: dict[str, type[Section]] = {
    **dict.fromkeys(("adamw", "adamw-8bit", "paged-adamw", "paged-adamw-8bit"), AdamWConfig),
    **dict.fromkeys(("lion", "lion-8bit"), LionConfig),
    "adafactor": AdafactorConfig,
    "sgd": SGDConfig,
}

OptimizerConfig = AdamWConfig | LionConfig | AdafactorConfig | SGDConfig
AnyOptimizer = Annotated[
    Annotated[OptimizerConfig, Discriminator("kind")] | None, BeforeValidator(named(OPTIMIZERS, optional=True))
]
SHARED = ("betas", "eps", "weight_decay")
"""Settings that `train` has too."""

"""What is learnt from pairs of a preferred and a rejected answer: one section per objective, told apart by `kind`.

The names stand for themselves where nothing else is to be said: `objective: dpo` is `objective: {kind: dpo}`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Discriminator, Field, model_validator

from graft.config.section import Section
from graft.errors import nearest

Reference = Literal["base", "init"]


class DPOConfig(Section):
    """Direct preference optimisation (Rafailov et al. 2023, arXiv 2305.18290)."""

    kind: Literal["dpo"] = "dpo"
    """dpo"""
    beta: float = Field(default=0.1, gt=0)
    """How strongly the adapter is held to the reference: larger stays closer."""
    label_smoothing: float = Field(default=0.0, ge=0, lt=0.5)
    """Share of pairs that are thought to be the wrong way round."""
    reference: Reference = "base"
    """What answers are compared with: the bare base, or the adapter of train.init_from as it was at the start."""


class IPOConfig(Section):
    """Identity preference optimisation (Azar et al. 2023, arXiv 2310.12036)."""

    kind: Literal["ipo"] = "ipo"
    """ipo"""
    beta: float = Field(default=0.1, gt=0)
    """The paper's tau: the margin per token that is aimed at is 1 / (2 beta)."""
    reference: Reference = "base"
    """What answers are compared with: the bare base, or the adapter of train.init_from as it was at the start."""


class CPOConfig(Section):
    """Contrastive preference optimisation (Xu et al. 2024, arXiv 2401.08417)."""

    kind: Literal["cpo"] = "cpo"
    """cpo"""
    beta: float = Field(default=0.1, gt=0)
    """Factor of the difference between the answers' log-probabilities."""
    loss: Literal["sigmoid", "hinge"] = "sigmoid"
    """The paper's logistic loss of the difference, or a hinge at 1."""
    label_smoothing: float = Field(default=0.0, ge=0, lt=0.5)
    """Share of pairs that are thought to be the wrong way round; of the logistic loss only."""
    nll: float = Field(default=1.0, ge=0)
    """Weight of the mean loss of the preferred answers' tokens, which is added."""

    @model_validator(mode="after")
    def _a_hinge_is_not_smoothed(self) -> CPOConfig:
        if self.loss == "hinge" and self.label_smoothing:
            raise ValueError("label_smoothing has no effect on loss: hinge: remove it, or use loss: sigmoid")
        return self


class ORPOConfig(Section):
    """Odds ratio preference optimisation (Hong et al. 2024, arXiv 2403.07691)."""

    kind: Literal["orpo"] = "orpo"
    """orpo"""
    beta: float = Field(default=0.1, gt=0)
    """The paper's lambda: weight of the odds ratio beside the mean loss of the preferred answers' tokens."""


class SimPOConfig(Section):
    """Simple preference optimisation (Meng et al. 2024, arXiv 2405.14734)."""

    kind: Literal["simpo"] = "simpo"
    """simpo"""
    beta: float = Field(default=0.1, gt=0)
    """Factor of the difference between the answers' mean log-probabilities per token; the paper takes 2 to 10."""
    gamma: float = Field(default=0.5, ge=0)
    """The margin that is aimed at, in units of the reward beta * log-probability."""
    label_smoothing: float = Field(default=0.0, ge=0, lt=0.5)
    """Share of pairs that are thought to be the wrong way round."""


OBJECTIVES: dict[str, type[Section]] = {
    "dpo": DPOConfig,
    "ipo": IPOConfig,
    "cpo": CPOConfig,
    "orpo": ORPOConfig,
    "simpo": SimPOConfig,
}


def _spelt(value: Any) -> Any:
    """The mapping that a name stands for. Raises `ValueError` for a kind that is none of ours, or missing."""
    if isinstance(value, Section) or value is None:
        return value
    given = value if isinstance(value, str) else value.get("kind") if isinstance(value, Mapping) else None
    if given not in OBJECTIVES:
        near = nearest(str(given), OBJECTIVES) if given is not None else None
        hint = f" (did you mean '{near}'?)" if near else ""
        raise ValueError(f"must be one of {', '.join(OBJECTIVES)}, or a mapping whose kind is one of them{hint}")
    return {"kind": value} if isinstance(value, str) else value


ObjectiveConfig = DPOConfig | IPOConfig | CPOConfig | ORPOConfig | SimPOConfig
AnyObjective = Annotated[Annotated[ObjectiveConfig, Discriminator("kind")] | None, BeforeValidator(_spelt)]

"""The objectives besides the mean loss: for preferred and rejected answers, in pairs or (kto) one by one, for two passes of a sample
(consistency), and for answers that a model drew (`policies.py`). One section each, with `kind` to tell them apart.

A name alone stands for the objective with its defaults: `objective: dpo` is `objective: {kind: dpo}`.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BeforeValidator, Discriminator, Field, model_validator

from graft.config.by_name import named
from graft.config.policies import POLICIES, PolicyConfig
from graft.config.section import Section

Reference = Literal["base", "init"]


class DPOConfig(Section):
    """Direct preference optimisation (Rafailov et al. 2023, arXiv 2305.18290)."""

    kind: Literal["dpo"] = "dpo"
    """dpo"""
    beta: float = Field(default=0.1, gt=0)
    """How strongly the reference holds the adapter: with a larger value it stays closer."""
    label_smoothing: float = Field(default=0.0, ge=0, lt=0.5)
    """Assumed share of pairs with the two answers swapped."""
    reference: Reference = "base"
    """The reference that answers are compared with: the base without adapters, or the adapter of train.init_from as it was at the start."""


class IPOConfig(Section):
    """Identity preference optimisation (Azar et al. 2023, arXiv 2310.12036)."""

    kind: Literal["ipo"] = "ipo"
    """ipo"""
    beta: float = Field(default=0.1, gt=0)
    """The paper's tau: the target margin per token is 1 / (2 beta)."""
    reference: Reference = "base"
    """The reference that answers are compared with: the base without adapters, or the adapter of train.init_from as it was at the start."""


class CPOConfig(Section):
    """Contrastive preference optimisation (Xu et al. 2024, arXiv 2401.08417)."""

    kind: Literal["cpo"] = "cpo"
    """cpo"""
    beta: float = Field(default=0.1, gt=0)
    """Factor on the difference of the answers' log-probabilities."""
    loss: Literal["sigmoid", "hinge"] = "sigmoid"
    """The paper's logistic loss of the difference, or a hinge at 1."""
    label_smoothing: float = Field(default=0.0, ge=0, lt=0.5)
    """Assumed share of pairs with the two answers swapped; for the logistic loss only."""
    nll: float = Field(default=1.0, ge=0)
    """Weight of the additional term: the mean loss of the preferred answers' tokens."""

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
    """The paper's lambda: weight of the odds-ratio term, relative to the mean loss of the preferred answers' tokens."""


class SimPOConfig(Section):
    """Simple preference optimisation (Meng et al. 2024, arXiv 2405.14734)."""

    kind: Literal["simpo"] = "simpo"
    """simpo"""
    beta: float = Field(default=0.1, gt=0)
    """Factor on the difference of the answers' mean log-probabilities per token; the paper uses 2 to 10."""
    gamma: float = Field(default=0.5, ge=0)
    """Target margin, in units of the reward beta * log-probability."""
    label_smoothing: float = Field(default=0.0, ge=0, lt=0.5)
    """Assumed share of pairs with the two answers swapped."""


class KTOConfig(Section):
    """Kahneman-Tversky optimisation (Ethayarajh et al. 2024, arXiv 2402.01306): answers that are marked good or bad one by one."""

    kind: Literal["kto"] = "kto"
    """kto"""
    beta: float = Field(default=0.1, gt=0)
    """How strongly the reference holds the adapter: with a larger value it stays closer."""
    desirable_weight: float = Field(default=1.0, ge=0)
    """The paper's lambda_D: weight of good answers."""
    undesirable_weight: float = Field(default=1.0, ge=0)
    """The paper's lambda_U: weight of bad answers."""
    reference: Reference = "base"
    """The reference that answers are compared with: the base without adapters, or the adapter of train.init_from as it was at the start."""


class ConsistencyConfig(Section):
    """The mean loss, and how far two random passes of each sample are apart (AdaMix: Wang et al. 2022, arXiv 2205.12410)."""

    kind: Literal["consistency"] = "consistency"
    """consistency"""
    weight: float = Field(default=1.0, gt=0)
    """The paper's lambda, the weight of the divergence between the answers of the two passes: 1 for classes, 100 for text."""
    label_smoothing: float = Field(default=0.0, ge=0, lt=1)
    """Share of each target that is spread over all classes, or over the vocabulary. The paper takes 0.1 for E2E and WebNLG."""


OBJECTIVES: dict[str, type[Section]] = {
    "dpo": DPOConfig,
    "ipo": IPOConfig,
    "cpo": CPOConfig,
    "orpo": ORPOConfig,
    "simpo": SimPOConfig,
    "kto": KTOConfig,
    "consistency": ConsistencyConfig,
    **POLICIES,
}


PreferenceConfig = DPOConfig | IPOConfig | CPOConfig | ORPOConfig | SimPOConfig | KTOConfig
"""The objectives that learn which answer is preferred."""
ObjectiveConfig = PreferenceConfig | ConsistencyConfig | PolicyConfig
AnyObjective = Annotated[
    Annotated[ObjectiveConfig, Discriminator("kind")] | None, BeforeValidator(named(OBJECTIVES, optional=True))
]

"""The objectives that learn from answers that a model drew, with the log-probabilities of the drawing and with advantages.

With l the log-probability of a token now, q that of the drawing, A the advantage and r = exp(l - q): see `token_losses.py`.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from graft.config.section import Section


class _Clipped(Section):
    clip_low_threshold: float = Field(default=0.8, ge=0)
    """Least ratio r that still has a gradient where the advantage would lower it further."""
    clip_high_threshold: float = Field(default=1.2, gt=0)
    """Largest ratio r that still has a gradient where the advantage would raise it further."""

    @model_validator(mode="after")
    def _low_is_below_high(self) -> _Clipped:
        if self.clip_low_threshold >= self.clip_high_threshold:
            raise ValueError(
                f"clip_low_threshold ({self.clip_low_threshold}) must be below clip_high_threshold ({self.clip_high_threshold})"
            )
        return self


class ImportanceSamplingConfig(Section):
    """The policy gradient with importance weights: -r A."""

    kind: Literal["importance_sampling"] = "importance_sampling"
    """importance_sampling"""


class PPOConfig(_Clipped):
    """Proximal policy optimisation (Schulman et al. 2017, arXiv 1707.06347)."""

    kind: Literal["ppo"] = "ppo"
    """ppo"""


class CISPOConfig(_Clipped):
    """Clipped importance weights as constants (MiniMax-M1 2025, arXiv 2506.13585)."""

    kind: Literal["cispo"] = "cispo"
    """cispo"""
    clip_low_threshold: float = Field(default=0.0, ge=0)
    """Least importance weight."""
    clip_high_threshold: float = Field(default=4.0, gt=0)
    """Largest importance weight."""


class DROConfig(Section):
    """Direct reward optimisation (Richemond et al. 2024, arXiv 2405.19107)."""

    kind: Literal["dro"] = "dro"
    """dro"""
    beta: float = Field(default=0.05, gt=0)
    """How strongly log-probabilities are held at those of the drawing."""


class GSPOConfig(_Clipped):
    """Group sequence policy optimisation, with one ratio for the whole answer (Zheng et al. 2025, arXiv 2507.18071)."""

    kind: Literal["gspo"] = "gspo"
    """gspo"""
    clip_low_threshold: float = Field(default=1 - 3e-4, ge=0)
    """Least ratio of the answer."""
    clip_high_threshold: float = Field(default=1 + 4e-4, gt=0)
    """Largest ratio of the answer."""


POLICIES: dict[str, type[Section]] = {
    "importance_sampling": ImportanceSamplingConfig,
    "ppo": PPOConfig,
    "cispo": CISPOConfig,
    "dro": DROConfig,
    "gspo": GSPOConfig,
}
PolicyConfig = ImportanceSamplingConfig | PPOConfig | CISPOConfig | DROConfig | GSPOConfig
"""The objectives that learn from drawn answers."""

"""Losses of samples that bring their targets, weights and advantages along, as sums over targets: supervised and policy-gradient.

With l = log p(target), q the log-probability when the sample was drawn, A the advantage, w the weight, r = exp(l - q), and [.] held
constant in backward:

    cross_entropy          -sum w l
    importance_sampling    -sum r A
    ppo                    -sum min(r A, clip(r, low, high) A)
    cispo                  -sum [clip(r, low, high)] A l
    dro                    -sum (A l - beta / 2 (l - q)^2)
    gspo                   ppo with r = s exp(l - [l]), s = exp(mean of l - q over the cells of the sample whose mask is not 0)

PPO: Schulman et al. 2017. CISPO: MiniMax-M1 2025. DRO: Richemond et al. 2024. GSPO: Zheng et al. 2025.

Legend: C cells, the targets of all samples one behind the other. In the code, logp is l and logprobs is q.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from graft.errors import GraftError, listed

Fields = Mapping[str, Tensor]
Settings = Mapping[str, float]


@dataclass(frozen=True)
class TokenLoss:
    """One loss: what it computes, and what it needs to know."""

    sum: Callable[[Tensor, Fields, Settings, Tensor], Tensor]
    """(l [C], fields [C] by name, settings, sample of each cell [C]) -> the loss as one sum. A field that may be missing is there."""
    fields: tuple[str, ...]
    """What each sample has to bring besides `target_tokens`."""
    optional: Mapping[str, float] = field(default_factory=dict)
    """What it may bring, with the value that stands in for a missing field."""
    settings: Mapping[str, float] = field(default_factory=dict)
    """Numbers for the whole loss, with their defaults."""

    def settled(self, name: str, given: Settings) -> dict[str, float]:
        """Return the settings with those given. Raises `GraftError` for an unknown one."""
        if unknown := sorted(set(given) - set(self.settings)):
            allowed = f"it takes {listed(sorted(self.settings), 5)}" if self.settings else "it takes none"
            raise GraftError(f"the loss {name} has no setting {listed(unknown, 5)}: {allowed}")
        return {**self.settings, **given}

    def check(self, name: str, given: Mapping[str, object]) -> None:
        """Raise `GraftError` for fields of a sample that are missing or unknown."""
        needed, known = {"target_tokens", *self.fields}, {"target_tokens", *self.fields, *self.optional}
        if missing := sorted(needed - set(given)):
            raise GraftError(
                f"the loss {name} needs {listed(missing, 5)} for each sample, beside {listed(sorted(given), 5)}"
            )
        if unknown := sorted(set(given) - known):
            raise GraftError(f"the loss {name} does not read {listed(unknown, 5)}: it reads {listed(sorted(known), 6)}")


def _cross_entropy(logp: Tensor, own: Fields, settings: Settings, sample: Tensor) -> Tensor:
    return -(own["weights"] * logp).sum()


def _importance_sampling(logp: Tensor, own: Fields, settings: Settings, sample: Tensor) -> Tensor:
    return -((logp - own["logprobs"]).exp() * own["advantages"]).sum()


def _ppo(logp: Tensor, own: Fields, settings: Settings, sample: Tensor) -> Tensor:
    return _clipped((logp - own["logprobs"]).exp(), own["advantages"], settings)


def _cispo(logp: Tensor, own: Fields, settings: Settings, sample: Tensor) -> Tensor:
    ratio = (logp.detach() - own["logprobs"]).exp().clamp(*_thresholds(settings))
    return -(ratio * own["advantages"] * logp).sum()


def _dro(logp: Tensor, own: Fields, settings: Settings, sample: Tensor) -> Tensor:
    return -(own["advantages"] * logp - settings["beta"] / 2 * (logp - own["logprobs"]).square()).sum()


def _gspo(logp: Tensor, own: Fields, settings: Settings, sample: Tensor) -> Tensor:
    kept = (own["sequence_ratio_mask"] != 0).to(logp.dtype)
    samples = int(sample[-1]) + 1 if len(sample) else 0
    total, count = logp.new_zeros(samples), logp.new_zeros(samples)
    total.index_add_(0, sample, (logp.detach() - own["logprobs"]) * kept)
    count.index_add_(0, sample, kept)
    ratio = (total / count.clamp(min=1)).exp()[sample]
    return _clipped(ratio * (logp - logp.detach()).exp(), own["advantages"], settings)


def _clipped(ratio: Tensor, advantages: Tensor, settings: Settings) -> Tensor:
    return -torch.minimum(ratio * advantages, ratio.clamp(*_thresholds(settings)) * advantages).sum()


def _thresholds(settings: Settings) -> tuple[float, float]:
    return settings["clip_low_threshold"], settings["clip_high_threshold"]


_POLICY = ("logprobs", "advantages")
_PPO_CLIP = {"clip_low_threshold": 0.8, "clip_high_threshold": 1.2}
TOKEN_LOSSES: dict[str, TokenLoss] = {
    "cross_entropy": TokenLoss(_cross_entropy, (), {"weights": 1.0}),
    "importance_sampling": TokenLoss(_importance_sampling, _POLICY),
    "ppo": TokenLoss(_ppo, _POLICY, settings=_PPO_CLIP),
    "cispo": TokenLoss(_cispo, _POLICY, settings={"clip_low_threshold": 0.0, "clip_high_threshold": 4.0}),
    "dro": TokenLoss(_dro, _POLICY, settings={"beta": 0.05}),
    # GSPO's thresholds around 1: those of the paper
    "gspo": TokenLoss(
        _gspo,
        (*_POLICY, "sequence_ratio_mask"),
        settings={"clip_low_threshold": 1 - 3e-4, "clip_high_threshold": 1 + 4e-4},
    ),
}
"""The losses by name."""


def token_loss(name: str) -> TokenLoss:
    """Return a loss by its name. Raises `GraftError` for an unknown one."""
    if name not in TOKEN_LOSSES:
        raise GraftError(f"there is no loss '{name}': allowed are {listed(list(TOKEN_LOSSES), 10)}")
    return TOKEN_LOSSES[name]

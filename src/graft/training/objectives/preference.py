"""Objectives over pairs of answers: what a job makes of the losses of its rows, to prefer one answer to another.

With c and r the log-probabilities of the chosen and the rejected answer, summed over their tokens, c' and r' those under the reference,
|c| and |r| the numbers of tokens, and s(x) = -(1 - e) log sigmoid(x) - e log sigmoid(-x) for a label smoothing e, the loss of a pair is

    dpo     s(beta ((c - c') - (r - r')))                                    Rafailov et al. 2023 (arXiv 2305.18290)
    ipo     ((c - c') / |c| - (r - r') / |r| - 1 / (2 beta))^2               Azar et al. 2023 (arXiv 2310.12036)
    cpo     s(beta (c - r)), or max(0, 1 - beta (c - r))                     Xu et al. 2024 (arXiv 2401.08417)
    orpo    -beta log sigmoid(odds(c / |c|) - odds(r / |r|))                 Hong et al. 2024 (arXiv 2403.07691)
    simpo   s(beta (c / |c| - r / |r|) - gamma)                              Meng et al. 2024 (arXiv 2405.14734)

where odds(x) = x - log(1 - e^x). A job's loss is the mean over the pairs of its whole step, to which cpo (times `nll`) and orpo add the
mean of -c over the chosen tokens of the step.

Legend: P pairs, R sequences.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from graft.config import CPOConfig, DPOConfig, IPOConfig, ORPOConfig, SimPOConfig
from graft.config.objectives import PreferenceConfig
from graft.training.objectives.supervised import Scores, Size
from graft.training.rows import Row, View


@dataclass(frozen=True)
class Pairs:
    """Log-probabilities of chosen and rejected answers, summed over their tokens, and their numbers of tokens; each [P]."""

    chosen: Tensor
    rejected: Tensor
    chosen_tokens: Tensor
    rejected_tokens: Tensor
    reference_chosen: Tensor | None = None
    reference_rejected: Tensor | None = None

    @classmethod
    def of(cls, rows: Sequence[Row], sums_R: Tensor) -> Pairs:
        """Sort the sums of losses by side and view. The rows are whole pairs, in the same order for each side and view."""

        def pick(part: int, view: View) -> list[int]:
            return [at for at, row in enumerate(rows) if row.part == part and row.view == view]

        own, theirs = [pick(0, "adapter"), pick(1, "adapter")], [pick(0, "reference"), pick(1, "reference")]
        counts_R = sums_R.new_tensor([row.targets for row in rows])
        reference = [-sums_R[at].detach() for at in theirs] if theirs[0] else [None, None]
        return cls(*(-sums_R[at] for at in own), *(counts_R[at] for at in own), *reference)

    @property
    def gains(self) -> tuple[Tensor, Tensor]:
        """Log-probabilities less those of the reference."""
        assert self.reference_chosen is not None and self.reference_rejected is not None
        return self.chosen - self.reference_chosen, self.rejected - self.reference_rejected

    @property
    def means(self) -> tuple[Tensor, Tensor]:
        """Log-probabilities per token."""
        return self.chosen / self.chosen_tokens, self.rejected / self.rejected_tokens


PairScores = tuple[Tensor, Tensor, Tensor]
"""The loss of each pair, the reward of its chosen answer and that of its rejected one; each [P]."""


def _dpo(config: DPOConfig, pairs: Pairs) -> PairScores:
    chosen, rejected = (config.beta * gain for gain in pairs.gains)
    return _smoothed(chosen - rejected, config.label_smoothing), chosen, rejected


def _ipo(config: IPOConfig, pairs: Pairs) -> PairScores:
    chosen, rejected = pairs.gains
    margin = chosen / pairs.chosen_tokens - rejected / pairs.rejected_tokens
    return (margin - 1 / (2 * config.beta)).square(), config.beta * chosen, config.beta * rejected


def _cpo(config: CPOConfig, pairs: Pairs) -> PairScores:
    chosen, rejected = config.beta * pairs.chosen, config.beta * pairs.rejected
    if config.loss == "hinge":
        return torch.relu(1 - (chosen - rejected)), chosen, rejected
    return _smoothed(chosen - rejected, config.label_smoothing), chosen, rejected


def _orpo(config: ORPOConfig, pairs: Pairs) -> PairScores:
    chosen, rejected = pairs.means
    ratio = _log_odds(chosen) - _log_odds(rejected)
    return -config.beta * logsigmoid(ratio), config.beta * chosen, config.beta * rejected


def _simpo(config: SimPOConfig, pairs: Pairs) -> PairScores:
    chosen, rejected = (config.beta * mean for mean in pairs.means)
    return _smoothed(chosen - rejected - config.gamma, config.label_smoothing), chosen, rejected


def _smoothed(margin: Tensor, smoothing: float) -> Tensor:
    loss = -logsigmoid(margin)
    return loss if not smoothing else (1 - smoothing) * loss - smoothing * logsigmoid(-margin)


def _log_odds(mean: Tensor) -> Tensor:
    """log(p / (1 - p)) of p = e^mean. An answer that is certain counts as one that is nearly so, and its odds stay finite."""
    mean = mean.clamp(max=-torch.finfo(mean.dtype).eps)
    return mean - torch.log(-torch.expm1(mean))


RULES: dict[str, Callable[[Any, Pairs], PairScores]] = {
    "dpo": _dpo, "ipo": _ipo, "cpo": _cpo, "orpo": _orpo, "simpo": _simpo,
}  # fmt: skip


class Preference:
    """An objective over pairs of answers, by the rule of its kind."""

    twice: ClassVar[bool] = False
    smoothing: ClassVar[float] = 0.0

    def __init__(self, config: PreferenceConfig) -> None:
        self.config, self._rule = config, RULES[config.kind]
        self.compares = isinstance(config, DPOConfig | IPOConfig)
        self.nll = config.nll if isinstance(config, CPOConfig) else float(isinstance(config, ORPOConfig))

    def size(self, rows: Sequence[Row]) -> Size:
        """Count the pairs of a whole step, and the targets of their chosen answers."""
        chosen = [row for row in rows if row.part == 0 and row.view == "adapter"]
        return Size(sum(row.targets for row in chosen), len(chosen))

    def share(self, rows: Sequence[Row], sums_R: Tensor, size: Size) -> Tensor:
        """What these rows, which are whole pairs, add to the step's loss. sums_R: the summed target losses of each row."""
        pairs = Pairs.of(rows, sums_R)
        return self._weighed(self._rule(self.config, pairs)[0], pairs, size)

    def _weighed(self, losses_P: Tensor, pairs: Pairs, size: Size) -> Tensor:
        share = losses_P.sum() / size.pairs
        return share - self.nll * pairs.chosen.sum() / size.targets if self.nll else share

    def scores(self, rows: Sequence[Row], sums_R: Tensor) -> Scores:
        """Scores of a whole step, or of all validation data.

        Besides the loss: the mean rewards and their margin, the share of pairs in which the chosen answer has the higher reward
        (accuracy), and the mean log-probabilities, per token where the objective compares those.
        """
        pairs = Pairs.of(rows, sums_R)
        losses_P, chosen, rejected = self._rule(self.config, pairs)
        logps = pairs.means if isinstance(self.config, ORPOConfig | SimPOConfig) else (pairs.chosen, pairs.rejected)
        return {
            "loss": float(self._weighed(losses_P, pairs, self.size(rows))),
            "accuracy": float((chosen > rejected).double().mean()),
            "margin": float((chosen - rejected).mean()),
            "rewards_chosen": float(chosen.mean()),
            "rewards_rejected": float(rejected.mean()),
            "logps_chosen": float(logps[0].mean()),
            "logps_rejected": float(logps[1].mean()),
        }

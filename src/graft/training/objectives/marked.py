"""KTO: an objective over single answers that are marked good or bad.

With a the log-probability of an answer, summed over its tokens, and a' that under the reference, the loss is

    d sigmoid(beta (z - (a - a'))) if good, u sigmoid(beta ((a - a') - z)) if bad

where z is how far the adapter is from its reference: the mean of m - m' over mismatched sequences m of the whole step, 0 at least, and a
constant for the gradient. The mismatched sequences run first, without gradients.

Ethayarajh et al. 2024 (arXiv 2402.01306).

Legend: P answers, R sequences.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import ClassVar

import torch
from torch import Tensor

from graft.config import KTOConfig
from graft.training.objectives.supervised import Scores, Size
from graft.training.rows import Row


class Marked:
    """KTO: an objective over answers that are marked good or bad. Part 1 of each sample is its mismatched sequence."""

    compares: ClassVar[bool] = True
    twice: ClassVar[bool] = False
    smoothing: ClassVar[float] = 0.0

    def __init__(self, config: KTOConfig) -> None:
        self.config = config

    def first(self, rows: Sequence[Row]) -> list[Row]:
        """The mismatched sequences."""
        return [row for row in rows if row.part == 1]

    def size(self, rows: Sequence[Row]) -> Size:
        """Count the answers of a whole step, and their targets."""
        own = [row for row in rows if row.part == 0 and row.view == "adapter"]
        return Size(sum(row.targets for row in own), len(own))

    def measured(self, size: Size, rows: Sequence[Row], sums_R: Tensor) -> Size:
        """Return the size with the distance that the mismatched sequences of the whole step give."""
        return replace(size, distance=float(self._gains(rows, sums_R, part=1).mean().clamp(min=0)))

    def share(self, rows: Sequence[Row], sums_R: Tensor, size: Size) -> Tensor:
        """What these rows add to the step's loss; mismatched sequences among them add nothing."""
        gains_P, good_P = self._gains(rows, sums_R, part=0), self._good(rows, sums_R)
        margin_P = torch.where(good_P, gains_P - size.distance, size.distance - gains_P)
        weights = sums_R.new_tensor([self.config.undesirable_weight, self.config.desirable_weight])
        weight_P = weights[good_P.long()]
        return (weight_P * torch.sigmoid(-self.config.beta * margin_P)).sum() / size.pairs

    def scores(self, rows: Sequence[Row], sums_R: Tensor) -> Scores:
        """Scores of a whole step, or of all validation data.

        Besides the loss: the distance (`kl`), the share of answers on the right side of it (accuracy), and where there are such answers,
        the mean rewards and log-probabilities of good and of bad ones, and the margin between the rewards.
        """
        size = self.measured(self.size(rows), rows, sums_R)
        gains_P, good_P = self._gains(rows, sums_R, part=0), self._good(rows, sums_R)
        logps_P = -sums_R[[at for at, row in enumerate(rows) if row.part == 0 and row.view == "adapter"]]
        found = {
            "loss": float(self.share(rows, sums_R, size)),
            "kl": size.distance,
            "accuracy": float(((gains_P > size.distance) == good_P).double().mean()),
        }
        for name, own_P in (("chosen", good_P), ("rejected", ~good_P)):
            if bool(own_P.any()):
                found[f"rewards_{name}"] = self.config.beta * float(gains_P[own_P].mean())
                found[f"logps_{name}"] = float(logps_P[own_P].mean())
        if "rewards_chosen" in found and "rewards_rejected" in found:
            found["margin"] = found["rewards_chosen"] - found["rewards_rejected"]
        return found

    def _gains(self, rows: Sequence[Row], sums_R: Tensor, part: int) -> Tensor:
        """Log-probabilities less those of the reference, of the answers (part 0) or the mismatched sequences (part 1). [P]"""
        own, theirs = (
            [at for at, row in enumerate(rows) if row.part == part and row.view == view]
            for view in ("adapter", "reference")
        )
        return sums_R[theirs].detach() - sums_R[own]

    def _good(self, rows: Sequence[Row], sums_R: Tensor) -> Tensor:
        marks = [bool(row.example.desirable) for row in rows if row.part == 0 and row.view == "adapter"]
        return torch.tensor(marks, device=sums_R.device)

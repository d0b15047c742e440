"""The mean loss over all targets, what a job without `train.objective` learns, and the counts and scores of every objective."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from graft.training.rows import Row

Scores = dict[str, float]
"""The loss and further scores of a step, by their names in metrics.jsonl."""


@dataclass(frozen=True)
class Size:
    """Counts of a whole step, by which its sums are divided."""

    targets: int
    """Targets of the adapter's rows; of pairs, the targets of the chosen answers."""
    pairs: int = 0
    """Pairs, or answers that are marked."""
    distance: float = 0.0
    """How far the adapter is from the reference, in nats: kto's z."""


class Supervised:
    """The mean loss over all targets: what a job without `train.objective` learns."""

    compares: ClassVar[bool] = False
    """Whether every sequence also runs through a reference."""
    twice: ClassVar[bool] = False
    """Whether every sequence also runs a second time, with other draws. The losses of these rows are divergences from the first."""
    smoothing: float = 0.0
    """Share of each target that is spread over the vocabulary, or over all classes."""

    def size(self, rows: Sequence[Row]) -> Size:
        """Count the targets of a whole step."""
        return Size(sum(row.targets for row in rows))

    def weights(self, rows: Sequence[Row], size: Size) -> list[float]:
        """The weight of each row's summed losses in the step's loss. Objectives that have no such weights compute a `share` alone."""
        return [1 / size.targets] * len(rows)

    def share(self, rows: Sequence[Row], sums_R: Tensor, size: Size) -> Tensor:
        """What these rows add to the step's loss. sums_R: the summed target losses of each row."""
        return (sums_R * sums_R.new_tensor(self.weights(rows, size))).sum()

    def scores(self, rows: Sequence[Row], sums_R: Tensor) -> Scores:
        """Scores of a whole step, or of all validation data."""
        return {"loss": float(self.share(rows, sums_R, self.size(rows)))}

"""Two passes of each sample with other random draws, of which the answers are pulled together.

With p and q the distributions of an answer's token (or of a class) in the two passes, and w a weight, a target y has the loss

    -log p(y) + w (KL(q || p) + KL(p || q)) / 2

in which the first distribution of each KL is a constant for the gradient: with respect to the logits of p, the second term has the gradient
w (p - q) / 2. The head makes the divergences chunk by chunk (`ops/divergence.py`), as the losses of the rows of the second pass.

Wang et al. 2022, "AdaMix" (arXiv 2205.12410).

Legend: R sequences.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from torch import Tensor

from graft.config.objectives import ConsistencyConfig
from graft.training.objectives.supervised import Scores, Size, Supervised
from graft.training.rows import Row


class Consistency(Supervised):
    """The mean loss over all targets of the first passes, and the mean divergence between them and the second ones."""

    twice: ClassVar[bool] = True

    def __init__(self, config: ConsistencyConfig) -> None:
        self.weight, self.smoothing = config.weight, config.label_smoothing

    def size(self, rows: Sequence[Row]) -> Size:
        """Count the targets of the first passes."""
        return super().size([row for row in rows if row.view == "adapter"])

    def weights(self, rows: Sequence[Row], size: Size) -> list[float]:
        """Second passes have the weight of the divergence."""
        return [(self.weight if row.view == "again" else 1.0) / size.targets for row in rows]

    def scores(self, rows: Sequence[Row], sums_R: Tensor) -> Scores:
        """The loss and, in training, the mean divergence per target."""
        again = [at for at, row in enumerate(rows) if row.view == "again"]
        scores = super().scores(rows, sums_R)
        return scores | ({"divergence": float(sums_R[again].sum()) / self.size(rows).targets} if again else {})

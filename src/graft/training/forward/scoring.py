"""Log-probabilities of given tokens by the trainer's own pass: the code that a step runs, without gradients.

Sampling feeds one token at a time through a KV cache, training whole sequences at once, so their numbers differ by rounding. Where a
loss compares the two, it sees the rounding as if the weights had changed. Scored by this pass, the old log-probabilities of a sample are
those that the next step computes.

Legend: N scored tokens.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import nn

from graft.attaching.bare import keep_context
from graft.data.samples import Example
from graft.injection.modes import evaluation_mode
from graft.training.batching import Batcher
from graft.training.forward.causal import Forward
from graft.training.rows import Row


class Scorer:
    """Scores sequences under adapters of a model."""

    def __init__(self, model: nn.Module, token_budget: int = 8192) -> None:
        """token_budget: most tokens of a pass, padding counted. Raises `GraftError` for a model without a language-model head."""
        keep_context(model)  # of a base without adapters
        self.model, self._forward = model, Forward(model)
        padding = getattr(self._forward.root.config.get_text_config(), "pad_token_id", None) or 0
        self._batcher, self._proved = Batcher(token_budget, "padded", padding), False

    def logprobs(
        self, sequences: Sequence[tuple[Sequence[int], int]], adapters: Sequence[str | None]
    ) -> list[list[float]]:
        """Return the log-probability in nats of the tokens of each sequence from a place on, at temperature 1.

        sequences: (token ids, number of tokens at the start that are only read, at least 1). adapters: one per sequence; None is the
        bare base.
        """
        rows = [
            _row(number, ids, start, name)
            for number, ((ids, start), name) in enumerate(zip(sequences, adapters, strict=True))
        ]
        found: list[list[float]] = [[] for _ in rows]
        keep_context(self.model)
        with torch.no_grad(), evaluation_mode(self.model):
            for part in self._batcher.cut([row for row in rows if row.targets]):
                batch, context = self._batcher.inputs(part, self._forward.device, seeded=False)
                if not self._proved:
                    self._forward.prove_head(batch, context)
                    self._proved = True
                losses_N = self._forward.losses(batch, context)
                for row, own in zip(part, losses_N.split([row.targets for row in part]), strict=True):
                    found[row.position] = (-own).tolist()
        return found


def _row(number: int, ids: Sequence[int], start: int, adapter: str | None) -> Row:
    supervised = np.arange(len(ids)) >= max(1, start)
    example = Example(np.array(ids, dtype=np.int32), supervised, "sample", number + 1)
    return Row("", adapter, example, number, number, 0, "adapter", 0, 0)

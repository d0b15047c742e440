"""Policy gradients over answers that a model drew: the losses of `token_losses.py`, as the objective of a run.

A row brings the tokens, the log-probabilities with which they were drawn, and advantages (`data/rollouts.py`). The loss of a step is the
sum over its tokens divided by their number.

Legend: R rows, n tokens of a row's answer.
"""

from __future__ import annotations

import torch
from torch import Tensor

from graft.config.policies import CISPOConfig, DROConfig, GSPOConfig, PolicyConfig, PPOConfig
from graft.data.samples import Example
from graft.training.objectives.supervised import Supervised
from graft.training.objectives.token_losses import TOKEN_LOSSES


class Policy(Supervised):
    """One of the token losses."""

    def __init__(self, config: PolicyConfig) -> None:
        self.loss = TOKEN_LOSSES[config.kind]
        given: dict[str, float] = {}
        if isinstance(config, DROConfig):
            given = {"beta": config.beta}
        elif isinstance(config, PPOConfig | CISPOConfig | GSPOConfig):
            given = {"clip_low_threshold": config.clip_low_threshold, "clip_high_threshold": config.clip_high_threshold}
        self.settings = self.loss.settled(config.kind, given)

    def of_row(self, losses_n: Tensor, example: Example) -> Tensor:
        """The summed loss of a row, from the losses of its tokens (their negative log-probabilities)."""
        assert example.logprobs is not None and example.advantages is not None
        fields = {
            "logprobs": torch.as_tensor(example.logprobs).to(losses_n),
            "advantages": torch.as_tensor(example.advantages).to(losses_n),
            "sequence_ratio_mask": torch.ones_like(losses_n),
        }
        number_n = torch.zeros(len(losses_n), dtype=torch.long, device=losses_n.device)
        return self.loss.sum(-losses_n, fields, self.settings, number_n)

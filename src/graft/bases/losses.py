"""The mean loss of a model on rows, and how far two models' answers lie apart, by ordinary forward passes.

Legend: N targets, V vocabulary; for classifiers V classes, for values V = 1.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from graft.bases.inputs import inputs_of
from graft.data.batches import Batch
from graft.injection.state import unwrapped

Way = Callable[[], AbstractContextManager[Any]]
"""Puts a model into a state for a block of code."""


def logits_at_targets(model: Any, batch: Batch) -> Tensor:
    """Return the logits that predict the targets of a padded batch on the model's device, [N, V], in float32."""
    return model(**inputs_of(unwrapped(model), batch)).logits.flatten(0, -2)[batch.target_index].float()


@dataclass(frozen=True)
class Answers:
    """What a model answers to rows, per target."""

    loss: float
    """The mean cross-entropy; for values the squared error."""
    divergence: float
    """The mean divergence from other answers; see `divergence`."""


def mean_loss(model: Any, batches: Sequence[Batch]) -> float:
    """Return the loss of the model over padded batches that are on its device."""
    return compared(model, batches, {})[0]


@torch.no_grad()
def compared(
    model: Any, batches: Sequence[Batch], ways: Mapping[str, Way], wanted: Way = nullcontext
) -> tuple[float, dict[str, Answers]]:
    """Return the loss of the model in a block of `wanted`, and its answers in a block of each other way, compared with those.

    batches: padded, on the model's device. Every batch runs once in each way.
    """
    loss, found = 0.0, {name: (0.0, 0.0) for name in ways}
    for batch in batches:
        values = batch.target_ids.is_floating_point()
        with wanted():
            right_NV = logits_at_targets(model, batch)
        loss += _loss(right_NV, batch)
        for name, way in ways.items():
            with way():
                given_NV = logits_at_targets(model, batch)
            far = float(divergence(given_NV, right_NV, values))
            found[name] = found[name][0] + _loss(given_NV, batch), found[name][1] + far
    count = sum(batch.num_targets for batch in batches)
    return loss / count, {name: Answers(own / count, far / count) for name, (own, far) in found.items()}


def _loss(logits_NV: Tensor, batch: Batch) -> float:
    """Return the sum of the losses of a batch's targets."""
    if batch.target_ids.is_floating_point():
        return float(F.mse_loss(logits_NV[:, 0], batch.target_ids.float(), reduction="sum"))
    return float(F.cross_entropy(logits_NV, batch.target_ids, reduction="sum"))


def divergence(logits_NV: Tensor, wanted_NV: Tensor, values: bool) -> Tensor:
    """Return the sum over targets of KL(wanted || given) in nats; of the squared difference for values."""
    if values:
        return F.mse_loss(logits_NV, wanted_NV, reduction="sum")
    return F.kl_div(logits_NV.log_softmax(-1), wanted_NV.log_softmax(-1), log_target=True, reduction="sum")

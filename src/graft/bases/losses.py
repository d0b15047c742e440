"""The mean loss of a model on rows, and how far two models' answers lie apart, by ordinary forward passes.

Legend: N targets, V vocabulary; for classifiers V classes, for values V = 1.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
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


@torch.no_grad()
def mean_loss(model: Any, batches: Sequence[Batch]) -> float:
    """Return the cross-entropy per target (for values, the squared error) over padded batches that are on the model's device."""
    total, count = 0.0, 0
    for batch in batches:
        logits_NV = logits_at_targets(model, batch)
        if batch.target_ids.is_floating_point():
            total += float(F.mse_loss(logits_NV[:, 0], batch.target_ids.float(), reduction="sum"))
        else:
            total += float(F.cross_entropy(logits_NV, batch.target_ids, reduction="sum"))
        count += batch.num_targets
    return total / count


@torch.no_grad()
def divergence_between(model: Any, batches: Sequence[Batch], given: Way, wanted: Way = nullcontext) -> float:
    """Return the mean divergence per target of the model one way from the model another way, each in a block of `given` or `wanted`."""
    total = 0.0
    for batch in batches:
        with wanted():
            right = logits_at_targets(model, batch)
        with given():
            total += float(divergence(logits_at_targets(model, batch), right, batch.target_ids.is_floating_point()))
    return total / sum(batch.num_targets for batch in batches)


def divergence(logits_NV: Tensor, wanted_NV: Tensor, values: bool) -> Tensor:
    """Return the sum over targets of KL(wanted || given) in nats; of the squared difference for values."""
    if values:
        return F.mse_loss(logits_NV, wanted_NV, reduction="sum")
    return F.kl_div(logits_NV.log_softmax(-1), wanted_NV.log_softmax(-1), log_target=True, reduction="sum")

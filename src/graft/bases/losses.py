"""The mean loss of a model on rows, by an ordinary forward pass."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.nn import functional as F

from graft.bases.inputs import inputs_of
from graft.data.batches import Batch
from graft.injection.state import unwrapped


@torch.no_grad()
def mean_loss(model: Any, batches: Sequence[Batch]) -> float:
    """Return the cross-entropy per target (for values, the squared error) over padded batches that are on the model's device."""
    total, count = 0.0, 0
    for batch in batches:
        logits_NV = model(**inputs_of(unwrapped(model), batch)).logits.flatten(0, -2)[batch.target_index].float()
        if batch.target_ids.is_floating_point():
            total += float(F.mse_loss(logits_NV[:, 0], batch.target_ids.float(), reduction="sum"))
        else:
            total += float(F.cross_entropy(logits_NV, batch.target_ids, reduction="sum"))
        count += batch.num_targets
    return total / count

"""From hidden states or logits to the loss of each target, and to the divergences of targets that two passes of a sample predict.

Legend: N targets, D hidden features, V vocabulary or classes.
"""

from __future__ import annotations

import torch
from torch import Tensor

from graft.data.batches import Batch
from graft.ops.cross_entropy import LogitTransform, cross_entropy, linear_cross_entropy
from graft.ops.divergence import two_pass_losses

PLAIN = LogitTransform()


def target_losses(
    x_ND: Tensor,
    batch: Batch,
    head: Tensor | None = None,
    bias: Tensor | None = None,
    transform: LogitTransform = PLAIN,
) -> Tensor:
    """Return the loss of each target [N], and of one in a second pass its divergence from the first, in float32 or wider.

    x_ND: hidden states, or finished logits [N, V] if there is no head.
    """

    def plain(x: Tensor, target: Tensor) -> Tensor:
        return cross_entropy(x, target) if head is None else linear_cross_entropy(x, head, bias, target, transform)

    twins, target_N = batch.twins, batch.target_ids
    if twins is None:
        return plain(x_ND, target_N)
    found = list(
        two_pass_losses(
            x_ND[twins.first], x_ND[twins.again], target_N[twins.first], twins.smoothing, head, bias, transform
        )
    )
    if len(twins.others):
        found.append(plain(x_ND[twins.others], target_N[twins.others]))
    order = torch.cat([twins.first, twins.again, twins.others]).argsort()
    return torch.cat(found)[order]

"""How much of what an adapter adds repeats what it reads (MixPHM): correlations between their features.

With the rows of F and U [L, D], what the adapter adds to and what it reads of the tokens of a sequence, divided by their norms,

    C = F^T U [D, D]        redundancy = sum_{i != j} C_ij^2

The squares of C add up to the sum over tokens m, n of (f_m . f_n)(u_m . u_n), so C itself, which is [D, D], is never made.

Jiang et al. 2023, "MixPHM" (arXiv 2303.01239). There C sums over the tokens of a whole batch; here each sequence has its own, so that it
does not depend on what else is in the batch.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F


def redundancy(read: Sequence[Tensor], added: Sequence[Tensor]) -> Tensor:
    """Return the redundancy of each sequence [R], in float32 or wider. read, added: the real tokens of each sequence, [L, D]."""
    return torch.stack([_of_one(u, f) for u, f in zip(read, added, strict=True)])


def _of_one(u: Tensor, f: Tensor) -> Tensor:
    exact = torch.promote_types(f.dtype, torch.float32)
    u, f = (F.normalize(each.to(exact), dim=-1) for each in (u, f))
    diagonal_D = (f * u).sum(0)
    return ((f @ f.T) * (u @ u.T)).sum() - diagonal_D.square().sum()

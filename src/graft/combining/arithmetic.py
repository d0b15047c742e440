"""Ways to make one tensor of several, each with a weight.

    linear              sum_k w_k T_k
    magnitude-prune     the same, after all but the largest |T_k| are set to zero
    dare                the same, after random entries are set to zero and the others divided by the share that is kept
    ties                prune by magnitude, elect for each entry the sign of the sum, and average w_k T_k over those that have this sign
    dare-ties           the same after random pruning

Ilharco et al. 2022, "Editing Models with Task Arithmetic" (arXiv 2212.04089); Yadav et al. 2023, "TIES-Merging" (arXiv 2306.01708);
Yu et al. 2023, "Language Models are Super Mario" (DARE, arXiv 2311.03099).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from graft.errors import GraftError

Arithmetic = Literal["linear", "magnitude-prune", "dare", "ties", "dare-ties"]


def combined(
    how: Arithmetic, tensors: Sequence[Tensor], weights: Sequence[float], density: float, generator: torch.Generator
) -> Tensor:
    """Return one tensor made of tensors of one shape. density: the share of entries that pruning keeps, above 0 and at most 1."""
    if how in ("magnitude-prune", "ties"):
        tensors = [largest(tensor, density) for tensor in tensors]
    elif how in ("dare", "dare-ties"):
        tensors = [at_random(tensor, density, generator) for tensor in tensors]
    weighted = torch.stack([weight * tensor for weight, tensor in zip(weights, tensors, strict=True)])
    if how not in ("ties", "dare-ties"):
        return weighted.sum(0)
    stacked = torch.stack(list(tensors))
    elected = torch.where(stacked.sum(0) >= 0, 1.0, -1.0)
    agrees = stacked.sign() == elected
    return (weighted * agrees).sum(0) / agrees.sum(0).clamp(min=1)


def largest(tensor: Tensor, density: float) -> Tensor:
    """Keep the share `density` of a tensor's entries that is largest by magnitude. Raises `GraftError` if that is none."""
    if not (count := int(density * tensor.numel())):
        raise GraftError(
            f"a density of {density:g} keeps none of {tensor.numel()} entries: choose at least {1 / tensor.numel():.2g}"
        )
    kept = tensor.abs().flatten().topk(count).indices
    return torch.zeros_like(tensor).flatten().index_copy(0, kept, tensor.flatten()[kept]).view(tensor.shape)


def at_random(tensor: Tensor, density: float, generator: torch.Generator) -> Tensor:
    """Keep each entry of a tensor with probability `density`, divided by it."""
    kept = torch.rand(tensor.shape, generator=generator) < density
    return tensor * kept.to(tensor) / density

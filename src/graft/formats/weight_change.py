"""What an adapter adds to the weight of a linear layer, and the LoRA that is nearest to it.

Legend: I input features, O output features, R rank.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from graft.adapters.folding import fold_steps
from graft.adapters.surroundings import Surroundings
from graft.errors import GraftError
from graft.formats.folder import SiteAdapter


def weight_change(host: Any, path: str, adapters: list[SiteAdapter]) -> Tensor:
    """Return what all parts of an adapter together add to one weight [O, I], in float32."""
    weight = Surroundings(host).weight().detach().float()
    whole, bias = weight.clone(), getattr(host, "bias", None)
    bias = None if bias is None else bias.detach().float()
    for fold, features in fold_steps([(adapter.module, adapter.features) for adapter in adapters]):
        new, new_bias = fold(whole[features], None if bias is None else bias[features])
        whole[features] = new
        if new_bias is not None and (bias is None or not torch.equal(new_bias, bias[features])):
            raise GraftError(f"the adapter changes the bias of '{path}', which a LoRA cannot")
    return whole - weight


def nearest_lora(delta: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Return A [R, I] and B [O, R] of the best approximation B A of a change [O, I] (Eckart and Young 1936).

    A layer smaller than the rank has fewer singular values: zeros fill the rest.
    """
    left, values, right = torch.linalg.svd(delta, full_matrices=False)
    kept = min(rank, len(values))
    roots = values[:kept].sqrt()  # each of A and B gets the root of the singular values
    A, B = roots[:, None] * right[:kept], left[:, :kept] * roots
    return torch.cat([A, A.new_zeros(rank - kept, A.shape[1])]), torch.cat([B, B.new_zeros(len(B), rank - kept)], 1)

"""A difference that has to be written out as a matrix: once for the product, and once more in backward.

Autograd would keep the matrices of all sites from forward to backward. Together they are as large as the base.

Legend: I input features, O output features.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from graft.adapters.parts.experts import holding
from graft.adapters.parts.weight_delta import WeightDelta
from graft.adapters.surroundings import Surroundings


class DenseDelta(WeightDelta):
    """A kind says what D [O, I] is; only the adapter's own parameters and x are kept for backward."""

    reads_weight: ClassVar[bool] = False
    """Whether D is made of the frozen weight: a base that does not hold it is then refused at attach, not in the first pass."""

    def on_install(self, around: Surroundings) -> None:
        super().on_install(around)
        if self.reads_weight:
            around.weight()

    def apply_to(self, x: Tensor) -> Tensor:
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():  # a compiler chooses by itself what it keeps
            # The parameters go along: in backward a mixture holds others in their places.
            now = dict(self.named_parameters())
            product = checkpoint(
                self._product, x, list(now), *now.values(), use_reentrant=False, preserve_rng_state=False
            )
            assert isinstance(product, Tensor)
            return product
        return F.linear(x, self.difference().to(x.dtype))

    def _product(self, x: Tensor, names: list[str], *tensors: Tensor) -> Tensor:
        with holding(self, dict(zip(names, tensors, strict=True))):
            return F.linear(x, self.difference().to(x.dtype))

"""A linear layer with its weight in 8 bits that computes with the dense weight: x W^T + b, W = codes * scales / 127.

bitsandbytes' own layer rounds the input to 8 bits as well, except features in which a value of any token in the batch exceeds a threshold
(LLM.int8(), arXiv 2208.07339). What a token gets then depends on the tokens beside it, on a CPU also on whether the model trains or
evaluates, and no weights could be merged that compute the same. The weights and the files are the same as bitsandbytes'.

This file imports bitsandbytes: import it only where it is needed.

Legend: I input features, O output features.
"""

from __future__ import annotations

from typing import Any

import torch
from bitsandbytes.nn.modules import Linear8bitLt  # pyright: ignore
from torch import Tensor, nn

from graft.architectures.eight_bit import scales_of
from graft.errors import GraftError
from graft.ops.packed import packed_product, packed_weight


class Int8Linear(Linear8bitLt):
    """A layer of bitsandbytes with weights in 8 bits; its input stays as it is."""

    computes_in: torch.dtype
    """The dtype of the model, in which the layer computes."""

    def forward(self, x: Tensor) -> Tensor:
        """Compute the layer. x: [..., I] -> [..., O]."""
        weight = packed_weight(self)
        if weight is None:
            raise GraftError("an 8-bit layer has lost its scales: load the base again")
        return packed_product(x, weight, None if self.bias is None else self.bias.to(x.dtype))


def compute_densely(root: nn.Module, dtype: torch.dtype) -> None:
    """Let every 8-bit layer of bitsandbytes in a model compute with its dense weight. dtype: the model's."""
    for module in root.modules():
        if type(module) is Linear8bitLt and not module.state.has_fp16_weights:
            held: Any = module
            held.weight.SCB, held.weight.CB = (
                scales_of(module),
                None,
            )  # `CB` is the weight again, and a copy would copy both
            held.state.CB = held.state.SCB = None
            held.__class__ = Int8Linear
            held.computes_in = dtype

"""Layers in few bits whose own forward passes no gradient to its input: an error before the first step.

Some kernels of quantised layers serve inference alone. Adapters in earlier layers would then learn through the residual stream only,
and nothing would say so: all of them still get gradients.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from graft.architectures.eight_bit import is_eight_bit
from graft.architectures.four_bit import is_four_bit
from graft.architectures.walk import base_modules, own_class
from graft.bases.quantised import method_of_layer
from graft.errors import GraftError
from graft.ops.packed import packed_weight


@torch.enable_grad()
def refuse_without_gradients(root: Any) -> None:
    """Raise `GraftError` if quantised layers of one sort pass no gradient to their input. One layer of each sort is tried.

    Those of bitsandbytes are known to pass it (`graft.architectures.four_bit`).
    """
    tried: set[tuple[type, type]] = set()
    for path, module in base_modules(root):
        method = method_of_layer(module)
        weight: Any = module._parameters.get("weight")
        sort = own_class(module), type(None if weight is None else weight.data)
        if method is None or is_four_bit(module) or is_eight_bit(module) or sort in tried:
            continue
        tried.add(sort)
        if not _passes_gradients(module, root):
            raise GraftError(
                f"the layers of this base in {method} pass no gradient to their input ('{path}', {sort[0].__name__}), so adapters before "
                "them would not learn: name the base that it was quantised from, with base.quantize nf4, fp4 or int8 where it has to be "
                "small"
            )


def _passes_gradients(module: nn.Module, root: Any) -> bool:
    """Run a layer's own forward on one token, without its adapters."""
    layer: Any = module
    packed = packed_weight(module)
    x = torch.zeros(1, 1, layer.in_features, device=root.device, dtype=root.dtype if packed is None else packed.dtype)
    out = own_class(module).forward(module, x.requires_grad_())
    return bool(out.requires_grad)

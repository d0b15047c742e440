"""The 4-bit layers of bitsandbytes, and how they stay trainable on a CPU.

Why: on a CPU with half-precision instructions such a layer packs its weight anew at its first evaluation, and from then on it passes no
gradient to its input. Adapters in earlier layers would then learn nothing through it, without an error. bitsandbytes has no public switch
for this, and none to tell whether a layer is packed.
Breaks: if bitsandbytes renames the layer's attribute `support_avx512bf16_for_cpu`, the packing is not forbidden; if it renames
`quant_state`, 4-bit layers keep their own, slower forward.
"""

from __future__ import annotations

import math
import sys
from typing import Any

from torch import Tensor, nn

from graft.architectures.walk import plain_class
from graft.errors import GraftError

PACKS = "support_avx512bf16_for_cpu"
"""The layer's attribute that allows packing."""
FORBIDDEN = "graft_packs"
"""An attribute that marks the layers where Graft has turned packing off."""


def forbid_packing(root: nn.Module) -> None:
    """Forbid every layer to pack its weight. Raises `GraftError` for a model with a packed layer, which is then unchanged."""
    layers = {path: module for path, module in root.named_modules() if PACKS in module.__dict__}
    for path, module in layers.items():
        if packed_for_inference(module):
            raise GraftError(
                f"'{path}' was packed by bitsandbytes when this model ran on the CPU, so no gradient passes through it: load the base "
                "again and attach adapters before the first forward pass"
            )
    for module in layers.values():
        if module.__dict__[PACKS]:
            module.__dict__[PACKS], module.__dict__[FORBIDDEN] = False, True


def allow_packing(root: nn.Module) -> None:
    """Undo `forbid_packing`."""
    for module in root.modules():
        if module.__dict__.pop(FORBIDDEN, False):
            module.__dict__[PACKS] = True


def is_four_bit(module: nn.Module) -> bool:
    """Whether a module is a 4-bit layer of bitsandbytes, and not of a class derived from one."""
    library = sys.modules.get("bitsandbytes")  # if it is not imported, there is no such layer
    return library is not None and plain_class(module) in (
        library.nn.Linear4bit,
        library.nn.LinearNF4,
        library.nn.LinearFP4,
    )


def quant_state_of(module: nn.Module) -> Any:
    """Return the `QuantState` with which bitsandbytes dequantises the layer's weight, None if it has none yet."""
    # A weight that ranks share is gathered as a plain parameter; bitsandbytes keeps its state on the layer too.
    return getattr(module.weight, "quant_state", None) or getattr(module, "quant_state", None)


def parameters_in(weight: Tensor) -> int:
    """Return the number of parameters that a tensor stands for: a 4-bit weight holds two in each byte."""
    state: Any = getattr(weight, "quant_state", None)
    return weight.numel() if state is None else math.prod(state.shape)


def packed_for_inference(module: nn.Module) -> bool:
    """Whether bitsandbytes has packed a 4-bit layer for a CPU's half-precision kernel, which gives its input no gradient."""
    return bool(getattr(quant_state_of(module), "packing_format_for_cpu", False))

"""bitsandbytes' 4-bit layers on a CPU, kept as they are while adapters are attached.

On a CPU with half-precision instructions such a layer packs its weight anew at the first evaluation, and hands no gradient on from then
on: adapters below it would learn nothing that depends on it, without an error.
"""

from __future__ import annotations

import sys

from torch import nn

from graft.errors import GraftError

PACKS = "support_avx512bf16_for_cpu"
"""The layer's own switch."""
FORBIDDEN = "graft_packs"


def forbid_packing(root: nn.Module) -> None:
    """Turn the switch off. Raises `GraftError` for a model with a layer that is packed already; nothing has then changed."""
    layers = {path: module for path, module in root.named_modules() if PACKS in module.__dict__}
    for path, module in layers.items():
        if packed_for_inference(module):
            raise GraftError(
                f"'{path}' was packed by bitsandbytes when this model ran on the CPU, and hands no gradient on: load the base anew and "
                "attach adapters before the first forward pass"
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
    """Whether a linear layer is one of bitsandbytes' 4-bit layers as they are."""
    library = sys.modules.get("bitsandbytes")  # not imported: no such layer
    own = getattr(type(module), "graft_base", type(module))
    return library is not None and own in (library.nn.Linear4bit, library.nn.LinearNF4, library.nn.LinearFP4)


def packed_for_inference(module: nn.Module) -> bool:
    """Whether bitsandbytes has packed a 4-bit layer for a CPU's half-precision kernel, which gives its input no gradient."""
    return bool(getattr(getattr(module.weight, "quant_state", None), "packing_format_for_cpu", False))

"""bitsandbytes' 4-bit layers on a CPU, kept as they are while adapters are attached.

On a CPU with half-precision instructions such a layer packs its weight anew at the first evaluation, and hands no gradient on from then
on: adapters below it would learn nothing that depends on it, without an error.
"""

from __future__ import annotations

from torch import nn

from graft.errors import GraftError
from graft.layers import packed_for_inference

PACKS = "support_avx512bf16_for_cpu"
"""The layer's own switch."""
NOTE = "graft_packs"


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
            module.__dict__[PACKS], module.__dict__[NOTE] = False, True


def allow_packing(root: nn.Module) -> None:
    """Undo `forbid_packing`."""
    for module in root.modules():
        if module.__dict__.pop(NOTE, False):
            module.__dict__[PACKS] = True

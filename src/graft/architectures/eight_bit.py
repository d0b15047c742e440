"""The 8-bit layers of bitsandbytes: whole numbers from -127 to 127 and, for each row, the largest absolute value.

Why: their scales lie on the weight until the layer's first forward pass, which moves them to the layer's state. Whoever reads the weight
has to look in both places, and bitsandbytes has no public function for it.
Breaks: if bitsandbytes renames `SCB`, the weights count as unreadable.
"""

from __future__ import annotations

import sys
from typing import Any

from torch import Tensor, nn


def is_eight_bit(module: nn.Module) -> bool:
    """Whether a module is an 8-bit layer of bitsandbytes with its weight in 8 bits."""
    library = sys.modules.get("bitsandbytes")  # if it is not imported, there is no such layer
    held: Any = module
    return library is not None and isinstance(module, library.nn.Linear8bitLt) and not held.state.has_fp16_weights


def scales_of(module: nn.Module) -> Tensor | None:
    """Return the largest absolute value of each row of an 8-bit layer's weight [O], None if it is not quantised yet."""
    held: Any = module
    on_weight = getattr(held.weight, "SCB", None)
    return held.state.SCB if on_weight is None else on_weight


def keep_scales(module: nn.Module) -> None:
    """Keep the scales of an 8-bit layer on its state, where they stay if the weight is cut into parts."""
    held: Any = module
    held.state.SCB = scales_of(module)

"""bitsandbytes, imported without what it does beside: a warning at every import, and a look for kernels on the hub.

Why: on a CPU with half-precision instructions bitsandbytes asks the package `kernels`, where it is installed, to fetch a kernel from the
hub, and warns where it gets none. The kernel serves packed weights only, which Graft forbids (`architectures/four_bit.py`).
Breaks: if bitsandbytes looks for the kernel later than at its import, it is fetched again.
"""

from __future__ import annotations

import logging
import sys
from types import ModuleType
from typing import Any

from graft.errors import require

_KERNELS = "kernels"


def bitsandbytes() -> ModuleType:
    """Import bitsandbytes. Raises `MissingExtra`, with the command that installs it, if it is missing."""
    if (found := sys.modules.get("bitsandbytes")) is not None:
        return found
    log, there = logging.getLogger("bitsandbytes"), sys.modules.get(_KERNELS)
    level, hidden = log.level, there is None
    modules: dict[str, Any] = sys.modules
    log.setLevel(logging.ERROR)
    if hidden:
        modules[_KERNELS] = None  # its import then fails, which bitsandbytes takes for a package that is not installed
    try:
        return require("bitsandbytes", "quant")
    finally:
        log.setLevel(level)
        if hidden:
            modules.pop(_KERNELS, None)

"""bitsandbytes, imported without what it does beside: a warning at every import, and a look for kernels on the hub.

transformers' schedules import PEFT where it is installed, and PEFT imports bitsandbytes: `without_kernels` is around that too.

Why: on a CPU with half-precision instructions bitsandbytes asks the package `kernels`, where it is installed, to fetch a kernel from the
hub, and warns where it gets none. The kernel serves packed weights only, which Graft forbids (`architectures/four_bit.py`).
Breaks: if bitsandbytes looks for the kernel later than at its import, it is fetched again.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

from graft.errors import require

_KERNELS = "kernels"


def bitsandbytes() -> ModuleType:
    """Import bitsandbytes. Raises `MissingExtra`, with the command that installs it, if it is missing."""
    with without_kernels():
        return require("bitsandbytes", "quant")


@contextmanager
def without_kernels() -> Iterator[None]:
    """In a block of code, let a first import of bitsandbytes look for no kernels and say nothing."""
    modules: dict[str, Any] = sys.modules
    log, hidden = logging.getLogger("bitsandbytes"), "bitsandbytes" not in modules and _KERNELS not in modules
    level = log.level
    log.setLevel(logging.ERROR)
    if hidden:
        modules[_KERNELS] = None  # its import then fails, which bitsandbytes takes for a package that is not installed
    try:
        yield
    finally:
        log.setLevel(level)
        if hidden:
            modules.pop(_KERNELS, None)

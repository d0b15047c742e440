"""Graft: fine-tune language models with adapters, small trainable modules grafted onto a frozen base.

The public names are imported on first use, so that `import graft` and `graft --help` do not import torch.
"""

# ruff: noqa: F401  the imports at the end serve type checkers and editors

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from graft.adapters.registry import built_in_classes
from graft.version import __version__ as __version__

# Public name -> the module that defines it. No module of this package may have a public name: importing a
# submodule binds it on the package and would hide the function.
_HOME = {
    "after_step": "graft.attaching.parameters",
    "attach": "graft.attaching.attach",
    "callback": "graft.attaching.trainer",
    "combine": "graft.combining.combine",
    "copy": "graft.attaching.renaming",
    "detach": "graft.attaching.attach",
    "names": "graft.attaching.parameters",
    "parameter_groups": "graft.attaching.parameters",
    "parameters": "graft.attaching.parameters",
    "penalty": "graft.attaching.parameters",
    "rename": "graft.attaching.renaming",
    "route": "graft.attaching.active",
    "set_active": "graft.attaching.active",
    "use": "graft.attaching.active",
    "merge": "graft.attaching.merge",
    "unmerge": "graft.attaching.merge",
    "export": "graft.formats.exporting",
    "kinds": "graft.adapters.registry",
    "presets": "graft.adapters.presets",
    "register": "graft.adapters.registry",
    "load": "graft.formats.loading",
    "make_reversible": "graft.reversible.making",
    "save": "graft.attaching.saving",
    "sites": "graft.attaching.summary",
    "summary": "graft.attaching.summary",
    "Run": "graft.run",
    "GraftError": "graft.errors",
    **built_in_classes(),
}

__all__ = sorted(_HOME)  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'graft' has no attribute '{name}'")
    value = getattr(importlib.import_module(_HOME[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


if TYPE_CHECKING:
    from graft.adapters.kinds.adalora import AdaLoRA
    from graft.adapters.kinds.bitfit import BitFit
    from graft.adapters.kinds.compacter import Compacter
    from graft.adapters.kinds.dora import DoRA
    from graft.adapters.kinds.full import Full
    from graft.adapters.kinds.gate import Gate
    from graft.adapters.kinds.hadamard import Hadamard
    from graft.adapters.kinds.head import Head
    from graft.adapters.kinds.hira import HiRA
    from graft.adapters.kinds.ia3 import IA3
    from graft.adapters.kinds.invertible import Invertible
    from graft.adapters.kinds.llama_adapter import LLaMAAdapter
    from graft.adapters.kinds.llama_adapter_v2 import LLaMAAdapterV2
    from graft.adapters.kinds.loha import LoHa
    from graft.adapters.kinds.lokr import LoKr
    from graft.adapters.kinds.lora import LoRA
    from graft.adapters.kinds.loretta import LorettaAdp, LorettaRep
    from graft.adapters.kinds.miss import MiSS
    from graft.adapters.kinds.mixture import Mixture
    from graft.adapters.kinds.oft import OFT
    from graft.adapters.kinds.p_tuning import PTuning
    from graft.adapters.kinds.parallel import Parallel
    from graft.adapters.kinds.pissa import PiSSA
    from graft.adapters.kinds.prefix import Prefix
    from graft.adapters.kinds.prompt import PromptTuning
    from graft.adapters.kinds.reft import ReFT
    from graft.adapters.kinds.series import Series
    from graft.adapters.kinds.shira import SHiRA
    from graft.adapters.kinds.stack import Stack
    from graft.adapters.kinds.sum import Sum
    from graft.adapters.kinds.vera import VeRA
    from graft.adapters.presets import presets
    from graft.adapters.registry import kinds, register
    from graft.attaching.active import route, set_active, use
    from graft.attaching.attach import attach, detach
    from graft.attaching.merge import merge, unmerge
    from graft.attaching.parameters import after_step, names, parameter_groups, parameters, penalty
    from graft.attaching.renaming import copy, rename
    from graft.attaching.saving import save
    from graft.attaching.summary import sites, summary
    from graft.attaching.trainer import callback
    from graft.combining.combine import combine
    from graft.errors import GraftError
    from graft.formats.exporting import export
    from graft.formats.loading import load
    from graft.reversible.making import make_reversible
    from graft.run import Run

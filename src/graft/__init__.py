"""Graft: fine-tune language models with adapters, small trainable modules grafted onto a frozen base.

The public names are imported on first use, so that `import graft` and `graft --help` do not import torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

# Public name -> the module that defines it. No module of this package may carry a public name: importing
# a submodule binds it on the package and would hide the function.
_HOME = {
    "after_step": "graft.inventory",
    "attach": "graft.attaching",
    "callback": "graft.callers",
    "copy": "graft.attaching",
    "detach": "graft.attaching",
    "names": "graft.inventory",
    "parameter_groups": "graft.inventory",
    "parameters": "graft.inventory",
    "penalty": "graft.inventory",
    "rename": "graft.attaching",
    "route": "graft.choosing",
    "set_active": "graft.choosing",
    "use": "graft.choosing",
    "merge": "graft.merging",
    "unmerge": "graft.merging",
    "export": "graft.interop.exporting",
    "load": "graft.checkpoint",
    "save": "graft.checkpoint",
    "sites": "graft.summary_table",
    "summary": "graft.summary_table",
    "AdaLoRA": "graft.adapters",
    "BitFit": "graft.adapters",
    "Hadamard": "graft.adapters",
    "IA3": "graft.adapters",
    "LLaMAAdapterV2": "graft.adapters",
    "Compacter": "graft.adapters",
    "DoRA": "graft.adapters",
    "Full": "graft.adapters",
    "Head": "graft.adapters",
    "LoHa": "graft.adapters",
    "LoKr": "graft.adapters",
    "LoRA": "graft.adapters",
    "LorettaAdp": "graft.adapters",
    "LorettaRep": "graft.adapters",
    "Parallel": "graft.adapters",
    "PiSSA": "graft.adapters",
    "Prefix": "graft.adapters",
    "PTuning": "graft.adapters",
    "PromptTuning": "graft.adapters",
    "LLaMAAdapter": "graft.adapters",
    "ReFT": "graft.adapters",
    "Series": "graft.adapters",
    "Stack": "graft.adapters",
    "kinds": "graft.adapters",
    "VeRA": "graft.adapters",
    "presets": "graft.adapters",
    "Run": "graft.run",
    "GraftError": "graft.errors",
}

__all__ = [
    "AdaLoRA",
    "BitFit",
    "Compacter",
    "DoRA",
    "Full",
    "GraftError",
    "Hadamard",
    "Head",
    "IA3",
    "LLaMAAdapterV2",
    "LoHa",
    "LoKr",
    "LoRA",
    "LorettaAdp",
    "LorettaRep",
    "PTuning",
    "Parallel",
    "PiSSA",
    "Prefix",
    "LLaMAAdapter",
    "PromptTuning",
    "ReFT",
    "Run",
    "Series",
    "Stack",
    "VeRA",
    "after_step",
    "attach",
    "callback",
    "copy",
    "detach",
    "export",
    "kinds",
    "load",
    "merge",
    "names",
    "parameter_groups",
    "parameters",
    "penalty",
    "presets",
    "rename",
    "route",
    "save",
    "set_active",
    "sites",
    "summary",
    "unmerge",
    "use",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'graft' has no attribute '{name}'")
    value = getattr(importlib.import_module(_HOME[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


if TYPE_CHECKING:
    from graft.adapters import (
        IA3,
        AdaLoRA,
        BitFit,
        Compacter,
        DoRA,
        Full,
        Hadamard,
        Head,
        LLaMAAdapter,
        LLaMAAdapterV2,
        LoHa,
        LoKr,
        LoRA,
        LorettaAdp,
        LorettaRep,
        Parallel,
        PiSSA,
        Prefix,
        PromptTuning,
        PTuning,
        ReFT,
        Series,
        Stack,
        VeRA,
        kinds,
        presets,
    )
    from graft.attaching import attach, copy, detach, rename
    from graft.callers import callback
    from graft.checkpoint import load, save
    from graft.choosing import route, set_active, use
    from graft.errors import GraftError
    from graft.interop.exporting import export
    from graft.inventory import after_step, names, parameter_groups, parameters, penalty
    from graft.merging import merge, unmerge
    from graft.run import Run
    from graft.summary_table import sites, summary

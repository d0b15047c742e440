"""Graft: fine-tune language models with adapters, small trainable modules grafted onto a frozen base.

The public names are imported on first use, so that `import graft` and `graft --help` do not import torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from graft.version import __version__ as __version__

# Public name -> the module that defines it. No module of this package may carry a public name: importing
# a submodule binds it on the package and would hide the function.
_HOME = {
    "after_step": "graft.attaching.parameters",
    "attach": "graft.attaching.attach",
    "callback": "graft.attaching.trainer",
    "copy": "graft.attaching.attach",
    "detach": "graft.attaching.attach",
    "names": "graft.attaching.parameters",
    "parameter_groups": "graft.attaching.parameters",
    "parameters": "graft.attaching.parameters",
    "penalty": "graft.attaching.parameters",
    "rename": "graft.attaching.attach",
    "route": "graft.attaching.active",
    "set_active": "graft.attaching.active",
    "use": "graft.attaching.active",
    "merge": "graft.attaching.merge",
    "unmerge": "graft.attaching.merge",
    "export": "graft.formats.exporting",
    "load": "graft.formats.loading",
    "save": "graft.attaching.saving",
    "sites": "graft.attaching.summary",
    "summary": "graft.attaching.summary",
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
    from graft.attaching.active import route, set_active, use
    from graft.attaching.attach import attach, copy, detach, rename
    from graft.attaching.merge import merge, unmerge
    from graft.attaching.parameters import after_step, names, parameter_groups, parameters, penalty
    from graft.attaching.saving import save
    from graft.attaching.summary import sites, summary
    from graft.attaching.trainer import callback
    from graft.errors import GraftError
    from graft.formats.exporting import export
    from graft.formats.loading import load
    from graft.run import Run

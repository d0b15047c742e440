"""The fingerprint of a base: its name, its shape, and a digest of a sample of its weights. An adapter folder says which base it is for.

The sample is rounded to bfloat16 first, so that a base loaded in float32 and in bfloat16 has one digest. Modules that an adapter replaces
do not count, because a fresh head is different each time the base is loaded.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from graft.architectures.walk import base_parameters
from graft.errors import GraftError
from graft.injection.state import State

_SHAPE = (
    "model_type",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "vocab_size",
)
_SAMPLED = 16


def fingerprint(root: nn.Module, state: State | None = None, without: Sequence[str] | None = None) -> dict[str, Any]:
    """Return the base's name, shape and digest. The digest is None if the sampled weights have no floating-point values (meta, quantised).

    without: paths of modules that do not count. None means those that the attached adapters replace.
    """
    without = replaced(state) if without is None else without
    config = getattr(root, "config", None)
    text = config.get_text_config() if config is not None and hasattr(config, "get_text_config") else config
    shape = {key: getattr(text, key) for key in _SHAPE if getattr(text, key, None) is not None}
    return {
        "model": getattr(root, "name_or_path", "") or type(root).__name__,
        "class": type(root).__name__,
        "shape": shape,
        "digest": _digest(root, state, without),
        **({"without": list(without)} if without else {}),
    }


def replaced(state: State | None) -> list[str]:
    """Return the paths of the modules that attached adapters replace."""
    installs = (
        [installed for attached in state.adapters.values() for installed in attached.installs]
        if state is not None
        else []
    )
    return sorted({installed.site.module for installed in installs if installed.config.replaces})


def _digest(root: nn.Module, state: State | None, without: Sequence[str]) -> str | None:
    originals = state.originals if state is not None else {}
    named = [
        (name, originals.get(name, parameter))
        for name, parameter in base_parameters(root)
        if name.rpartition(".")[0] not in without
    ]
    chosen = named[:: max(1, len(named) // _SAMPLED)]
    hasher = hashlib.sha256()
    for name, parameter in chosen:
        if parameter.device.type == "meta" or not parameter.is_floating_point() or type(parameter.data) is not Tensor:
            return None
        sample = parameter.detach().flatten()[:64].to("cpu", torch.bfloat16)
        hasher.update(name.encode() + sample.view(torch.int16).numpy().tobytes())
    return hasher.hexdigest()[:16]


def check_base(made_for: dict[str, Any], root: nn.Module, state: State | None, folder: str) -> None:
    """Raise `GraftError`, with the names of both bases, if an adapter was made for another base."""
    here = fingerprint(root, state, made_for.get("without", ()))
    differing = [key for key, value in made_for["shape"].items() if here["shape"].get(key, value) != value]
    if differing:
        said = "; ".join(f"{key} {made_for['shape'][key]} there, {here['shape'][key]} here" for key in differing)
        raise GraftError(
            f"the adapter in {folder} was made for '{made_for['model']}', not for '{here['model']}': {said}"
        )
    if made_for["digest"] and here["digest"] and made_for["digest"] != here["digest"]:
        raise GraftError(
            f"the adapter in {folder} was made for '{made_for['model']}' (weights {made_for['digest']}), but this base, '{here['model']}', "
            f"has other weights ({here['digest']}). If that is what you want, load with any_base=True."
        )

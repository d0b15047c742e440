"""The adapter kinds: the registry below is the only list of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import ValidationError

from graft.adapters.base import Adapter, AdapterConfig, CannotFold
from graft.adapters.hooks import AttentionAdapter
from graft.adapters.kinds.adalora import AdaLoRA
from graft.adapters.kinds.bitfit import BitFit
from graft.adapters.kinds.compacter import Compacter
from graft.adapters.kinds.dora import DoRA
from graft.adapters.kinds.full import Full
from graft.adapters.kinds.hadamard import Hadamard
from graft.adapters.kinds.head import Head
from graft.adapters.kinds.ia3 import IA3
from graft.adapters.kinds.llama_adapter import LLaMAAdapter
from graft.adapters.kinds.llama_adapter_v2 import LLaMAAdapterV2
from graft.adapters.kinds.loha import LoHa
from graft.adapters.kinds.lokr import LoKr
from graft.adapters.kinds.lora import LoRA
from graft.adapters.kinds.loretta import LorettaAdp, LorettaRep
from graft.adapters.kinds.p_tuning import PTuning
from graft.adapters.kinds.parallel import Parallel
from graft.adapters.kinds.pissa import PiSSA
from graft.adapters.kinds.prefix import Prefix
from graft.adapters.kinds.prompt import PromptTuning
from graft.adapters.kinds.reft import ReFT
from graft.adapters.kinds.series import Series
from graft.adapters.kinds.stack import Stack
from graft.adapters.kinds.vera import VeRA
from graft.adapters.presets import Preset, preset, presets
from graft.architectures.site import SiteSpec
from graft.errors import GraftError, did_you_mean

KINDS: dict[str, type[AdapterConfig]] = {
    config.model_fields["kind"].default: config
    for config in (
        LoRA,
        DoRA,
        PiSSA,
        VeRA,
        AdaLoRA,
        LoHa,
        LoKr,
        Series,
        Parallel,
        Compacter,
        LorettaAdp,
        LorettaRep,
        Prefix,
        LLaMAAdapter,
        PromptTuning,
        PTuning,
        ReFT,
        IA3,
        BitFit,
        Hadamard,
        LLaMAAdapterV2,
        Full,
        Head,
        Stack,
    )
}

__all__ = [
    "KINDS", "AdaLoRA", "Adapter", "AdapterConfig", "AttentionAdapter", "BitFit", "CannotFold", "Compacter", "DoRA", "Full", "Hadamard",
    "Head", "IA3", "LLaMAAdapterV2", "LoHa", "LoKr", "LoRA", "LorettaAdp", "LorettaRep", "PTuning", "Parallel", "PiSSA", "SiteSpec",
    "Prefix", "Preset", "PromptTuning", "ReFT", "LLaMAAdapter", "Series", "Stack", "VeRA", "kinds", "parse", "presets",
]  # fmt: skip


def kinds() -> dict[str, type[AdapterConfig]]:
    """Every adapter kind by its name in YAML."""
    return dict(KINDS)


def parse(value: Any) -> AdapterConfig | Preset:
    """What the user wrote of an adapter: a config, a preset's name, a mapping with `kind` or `preset`, or a list of these (a stack).

    Raises `GraftError` for an unknown kind, preset or field, each with the nearest allowed name.
    """
    if isinstance(value, AdapterConfig | Preset):
        return value
    if isinstance(value, str):
        return KINDS[value].model_validate({}) if value in KINDS else preset(value)
    if isinstance(value, Mapping):
        return _parse_mapping(dict(value))
    if isinstance(value, Sequence):
        return Stack(adapters=tuple(value))
    raise GraftError(
        f"an adapter is a config, a preset's name, a mapping or a list of these; given {type(value).__name__}: {value!r}"
    )


def _parse_mapping(value: dict[str, Any]) -> AdapterConfig | Preset:
    if "preset" in value:
        return preset(value.pop("preset"), value)
    kind = value.get("kind")
    if kind is None:
        raise GraftError(
            f"an adapter needs `kind` (one of: {', '.join(KINDS)}) or `preset`; given keys: {', '.join(value) or 'none'}"
        )
    if kind not in KINDS:
        raise GraftError(
            f"unknown adapter kind '{kind}'.{did_you_mean(str(kind), KINDS)} There are: {', '.join(KINDS)}"
        )
    config = KINDS[kind]
    for key in value:
        if key not in config.model_fields:
            known = ", ".join(config.model_fields)
            raise GraftError(
                f"adapter kind '{kind}' has no field '{key}'.{did_you_mean(key, config.model_fields)} It has: {known}"
            )
    try:
        return config.model_validate(value)
    except ValidationError as error:
        lines = [
            f"{'.'.join(map(str, item['loc']))}: {item['msg']} (given {item['input']!r})" for item in error.errors()
        ]
        raise GraftError(f"adapter kind '{kind}': " + "; ".join(lines)) from error

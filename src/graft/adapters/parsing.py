"""Turn what a user writes into an adapter's config: a mapping with a kind, the name of a preset, a config, or a list of these."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from graft.adapters.base import AdapterConfig
from graft.adapters.presets import Preset, preset
from graft.adapters.registry import entries, kind_class
from graft.errors import GraftError, did_you_mean


def parse(value: Any) -> AdapterConfig | Preset:
    """Return the config or preset that a user means: a config, a name of a kind or preset, a mapping, or a list of these (a stack).

    Raises `GraftError` for an unknown kind, preset or field, each with the nearest allowed name.
    """
    if isinstance(value, AdapterConfig | Preset):
        return value
    if isinstance(value, str):
        return kind_class(value)() if value in entries() else preset(value)
    if isinstance(value, Mapping):
        return _parse_mapping(dict(value))
    if isinstance(value, Sequence):
        return kind_class("stack")(adapters=tuple(value))
    raise GraftError(
        f"an adapter is a config, a preset's name, a mapping or a list of these; given {type(value).__name__}: {value!r}"
    )


def _parse_mapping(value: dict[str, Any]) -> AdapterConfig | Preset:
    if "preset" in value:
        return preset(value.pop("preset"), value)
    if "from" in value and "kind" not in value:  # a trained adapter by its folder
        value = {"kind": "trained", "folder": value.pop("from"), **value}
    kind = value.get("kind")
    if kind is None:
        raise GraftError(
            f"an adapter needs `kind` (one of: {', '.join(entries())}) or `preset`; given keys: {', '.join(map(str, value)) or 'none'}"
        )
    config = kind_class(kind)
    for key in value:
        if key not in config.model_fields:
            known = ", ".join(config.model_fields)
            raise GraftError(
                f"adapter kind '{kind}' has no field '{key}'.{did_you_mean(str(key), config.model_fields)} It has: {known}"
            )
    return config(**value)

"""Published configurations by name. What depends on the model family is filled in when the adapter is attached to a model.

llm-adapters/*      The commands in the repository of Hu et al. 2023, "LLM-Adapters" (arXiv 2304.01933). LoRA has rank 32 on q, k, v, up and
                    down. Bottlenecks have 256 features, tanh, no biases and weights from N(0, 0.02). The prefix has 10 tokens from N(0, 1),
                    and the positions of the sequence start after it.
papers/*            The settings of the papers that the files of the kinds name, with trained norms where the paper trains them.
papers/distilbert   "Finetuning LLMs Efficiently with Adapters" (Raschka 2023): two bottlenecks per block in place of the sublayers'
outputs.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel, ConfigDict

from graft.adapters.base import AdapterConfig
from graft.adapters.registry import kind_class
from graft.errors import GraftError, did_you_mean

_BOTTLENECK = {"bottleneck": 256, "activation": "tanh", "biases": False, "init": "bert"}

_NORMS = {"kind": "full", "sites": "norm"}

_PFEIFFER = {"kind": "series", "bottleneck": 48, "reads": "stream", "init": "bert"}

_MEFT = {"bottleneck": 8, "activation": "gelu", "hidden_dropout": 0.1, "init": "bert"}

_PRESETS: dict[str, dict[str, Any] | list[dict[str, Any]]] = {
    "llm-adapters/lora": {"kind": "lora", "rank": 32, "alpha": 64, "dropout": 0.05, "sites": "{qkv} mlp.up mlp.down"},
    "llm-adapters/series": {"kind": "series", "sites": "mlp.down", **_BOTTLENECK},
    "llm-adapters/adapterp": {"kind": "series", "sites": "mlp.down", **_BOTTLENECK},
    "llm-adapters/adapterh": [
        {"kind": "series", "position": "before", "sites": "{into_mlp}", **_BOTTLENECK},
        {"kind": "series", "position": "after", "sites": "mlp.down", **_BOTTLENECK},
    ],
    "llm-adapters/parallel": {"kind": "parallel", "sites": "mlp.up mlp.down", **_BOTTLENECK},
    "llm-adapters/prefix": {"kind": "prefix", "tokens": 10, "init_std": 1.0, "positions": "after_prefix"},
    "papers/houlsby": [
        {"kind": "series", "bottleneck": 64, "activation": "gelu", "init": "houlsby", "sites": "attn mlp"},
        _NORMS,
    ],
    "papers/pfeiffer": {**_PFEIFFER, "sites": "mlp"},
    "papers/parallel": {"kind": "parallel", "bottleneck": 512, "scale": 4.0, "init": "mam", "sites": "mlp"},
    "papers/mam": [
        {"kind": "prefix", "tokens": 30, "projection": 800},
        {"kind": "parallel", "bottleneck": 512, "scale": 4.0, "init": "mam", "sites": "mlp"},
    ],
    "papers/unipelt": [
        {"kind": "gate", "of": {"kind": "prefix", "tokens": 10, "projection": 512}, "sites": "attn"},
        {"kind": "gate", "of": {"kind": "lora", "rank": 8, "alpha": 8.0}, "sites": "attn.q attn.v"},
        {"kind": "gate", "of": _PFEIFFER, "reads": "output", "sites": "mlp"},
    ],
    "papers/unipelt-ap": [
        {"kind": "gate", "of": {"kind": "prefix", "tokens": 10, "projection": 512}, "sites": "attn"},
        {"kind": "gate", "of": _PFEIFFER, "reads": "output", "sites": "mlp"},
    ],
    "papers/compacter": [{"kind": "compacter", "sites": "attn mlp"}, _NORMS],
    "papers/compacter++": [{"kind": "compacter", "sites": "mlp"}, _NORMS],
    "papers/loretta-adp": [
        {"kind": "loretta-adp", "position": "before", "sites": "{into_mlp}"},
        {"kind": "loretta-adp", "sites": "mlp.down"},
        _NORMS,
    ],
    "papers/loretta-rep": [{"kind": "loretta-rep", "tt_rank": 8, "dropout": 0.05, "sites": "attn.q attn.v"}, _NORMS],
    "papers/meft1": [
        {"kind": "parallel", "sites": "stream", **_MEFT},
        {"kind": "parallel", "sites": "mlp", **_MEFT},
    ],
    "papers/meft2": [
        {"kind": "parallel", "sites": "stream", **_MEFT},
        {"kind": "parallel", "sites": "mlp", **_MEFT},
    ],
    "papers/meft3": [{"kind": "series", "sites": "attn", **_MEFT}, {"kind": "parallel", "sites": "mlp", **_MEFT}],
    "papers/adamix": {
        "kind": "mixture", "experts": 4, "share": "up", "sites": "mlp.down",
        "of": {"kind": "series", "bottleneck": 48, "activation": "gelu", "init": "bert"},
    },
    "papers/adamix-lora": {
        "kind": "mixture", "experts": 8, "share": "up", "start": "copies", "sites": "attn.q attn.v",
        "of": {"kind": "lora", "rank": 4, "alpha": 32.0, "dropout": 0.1},
    },
    "papers/mixphm": {
        "kind": "mixture", "experts": 4, "share": "down", "start": "copies", "sites": "mlp.down",
        "of": {"kind": "compacter", "bottleneck": 64, "rank": 8, "hidden_dropout": 0.5, "rule_std": 0.01},
    },
    "papers/distilbert": {
        "kind": "series", "bottleneck": 32, "activation": "gelu", "skip": "none", "init": "torch", "sites": "attn mlp",
    },
}  # fmt: skip
"""Preset -> an adapter, or the parts of a stack. {qkv} and {into_mlp} stand for the sites of a family (see `Preset._filled`)."""


class Preset(BaseModel):
    """A published configuration by name, with the fields that the user changes."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    preset: str
    changes: dict[str, Any] = {}

    def resolve(self, site_names: frozenset[str]) -> AdapterConfig:
        """Return the config for a model that has these sites."""
        entry = _PRESETS[self.preset]
        filled = [self._filled(part, site_names) for part in (entry if isinstance(entry, list) else [entry])]
        parts = tuple(kind_class(part["kind"])(**part) for part in filled)
        return parts[0] if len(parts) == 1 else kind_class("stack")(adapters=parts)

    def _filled(self, part: Mapping[str, Any], site_names: frozenset[str]) -> dict[str, Any]:
        """Apply the user's changes to one part, and fill in the sites that depend on the family."""
        filled = _changed(part, self.changes)
        if isinstance(filled.get("sites"), str):
            qkv = "attn.qkv" if "attn.qkv" in site_names else "attn.q attn.k attn.v"
            into_mlp = "mlp.gate mlp.up" if "mlp.gate" in site_names else "mlp.up"
            filled["sites"] = filled["sites"].replace("{qkv}", qkv).replace("{into_mlp}", into_mlp)
        return filled


def preset(name: Any, changes: Mapping[str, Any] | None = None) -> Preset:
    """Return a preset with changes.

    Raises `GraftError` for an unknown preset or field, with the nearest name, and for a wrong value of a field.
    """
    if not isinstance(name, str) or name not in _PRESETS:
        raise GraftError(
            f"unknown preset '{name}'.{did_you_mean(str(name), _PRESETS)} There are: {', '.join(_PRESETS)}"
        )
    entry, changes = _PRESETS[name], dict(changes or {})
    fields = {field for part in (entry if isinstance(entry, list) else [entry]) for field in _fields_of(part)}
    for key in changes:
        if key not in fields:
            raise GraftError(
                f"preset '{name}' has no field '{key}'.{did_you_mean(str(key), fields)} It has: {', '.join(sorted(fields))}"
            )
    found = Preset(preset=name, changes=changes)
    found.resolve(frozenset())  # raises for a wrong value
    return found


def _changed(part: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """Return a part with those changes that are settings of its kind: `tokens` reaches the prefix of MAM and not its bottleneck.

    In a kind around another they reach the inner one too, but for the sites, which are given outside.
    """
    own = set(kind_class(part["kind"]).model_fields) - {"kind", "of"}
    changed = {**part, **{key: value for key, value in changes.items() if key in own}}
    if "of" in part:
        changed["of"] = _changed(part["of"], {key: value for key, value in changes.items() if key != "sites"})
    return changed


def _fields_of(part: Mapping[str, Any]) -> set[str]:
    """Return the settings of a part's kind, and of the kind inside it."""
    own = set(kind_class(part["kind"]).model_fields) - {"kind", "of"}
    return own | _fields_of(part["of"]) if "of" in part else own


def presets() -> tuple[str, ...]:
    """Return the names of all presets."""
    return tuple(_PRESETS)


def parts_of(name: str) -> list[dict[str, Any]]:
    """Return what a preset contains: the settings of an adapter, or of each part of a stack.

    In `sites`, {qkv} stands for attn.q attn.k attn.v or attn.qkv, and {into_mlp} for mlp.gate and mlp.up as far as a base has them.
    """
    entry = _PRESETS[name]
    return [dict(part) for part in (entry if isinstance(entry, list) else [entry])]

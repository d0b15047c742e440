"""The adapter kinds by name: those of Graft, those of installed packages, and those that a program registers.

The registry holds "module:Class" for each kind and imports it when it is first used. To add a kind to Graft, write its file in `kinds/` and
add a line to `BUILT_IN`. Another package adds a kind by an entry point:

    [project.entry-points."graft.kinds"]
    my-kind = "my_package.my_kind:MyKind"

A script or notebook calls `graft.register(MyKind)`.
"""

from __future__ import annotations

import functools
import importlib
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from graft.errors import GraftError, did_you_mean

if TYPE_CHECKING:
    from graft.adapters.base import AdapterConfig

BUILT_IN: dict[str, str] = {
    "lora": "graft.adapters.kinds.lora:LoRA",
    "dora": "graft.adapters.kinds.dora:DoRA",
    "pissa": "graft.adapters.kinds.pissa:PiSSA",
    "vera": "graft.adapters.kinds.vera:VeRA",
    "adalora": "graft.adapters.kinds.adalora:AdaLoRA",
    "loha": "graft.adapters.kinds.loha:LoHa",
    "lokr": "graft.adapters.kinds.lokr:LoKr",
    "miss": "graft.adapters.kinds.miss:MiSS",
    "hira": "graft.adapters.kinds.hira:HiRA",
    "shira": "graft.adapters.kinds.shira:SHiRA",
    "oft": "graft.adapters.kinds.oft:OFT",
    "series": "graft.adapters.kinds.series:Series",
    "parallel": "graft.adapters.kinds.parallel:Parallel",
    "compacter": "graft.adapters.kinds.compacter:Compacter",
    "loretta-adp": "graft.adapters.kinds.loretta:LorettaAdp",
    "loretta-rep": "graft.adapters.kinds.loretta:LorettaRep",
    "prefix": "graft.adapters.kinds.prefix:Prefix",
    "llama-adapter": "graft.adapters.kinds.llama_adapter:LLaMAAdapter",
    "prompt": "graft.adapters.kinds.prompt:PromptTuning",
    "p-tuning": "graft.adapters.kinds.p_tuning:PTuning",
    "reft": "graft.adapters.kinds.reft:ReFT",
    "ia3": "graft.adapters.kinds.ia3:IA3",
    "bitfit": "graft.adapters.kinds.bitfit:BitFit",
    "hadamard": "graft.adapters.kinds.hadamard:Hadamard",
    "llama-adapter-v2": "graft.adapters.kinds.llama_adapter_v2:LLaMAAdapterV2",
    "full": "graft.adapters.kinds.full:Full",
    "head": "graft.adapters.kinds.head:Head",
    "gate": "graft.adapters.kinds.gate:Gate",
    "invertible": "graft.adapters.kinds.invertible:Invertible",
    "sum": "graft.adapters.kinds.sum:Sum",
    "stack": "graft.adapters.kinds.stack:Stack",
    "trained": "graft.adapters.kinds.trained:Trained",
    "mixture": "graft.adapters.kinds.mixture:Mixture",
    "fusion": "graft.adapters.kinds.fusion:Fusion",
}
BY_REFERENCE = ("trained", "fusion")
"""Kinds that stand for adapters in folders. Without these they mean nothing, so lists of kinds leave them out."""
GROUP = "graft.kinds"
"""The entry-point group of the kinds in other packages."""
Config = TypeVar("Config", bound="type[AdapterConfig]")


@dataclass(frozen=True)
class Entry:
    """Where a kind comes from."""

    target: str
    """"module:Class"."""
    origin: str
    """"graft", the package that brings the kind ("my-package 1.2"), or "registered"."""


_registered: dict[str, type[AdapterConfig]] = {}


def entries() -> dict[str, Entry]:
    """Return every kind by its name in YAML: Graft's, then those of installed packages, then registered ones. Imports nothing."""
    return {
        **{name: Entry(target, "graft") for name, target in BUILT_IN.items()},
        **_of_packages(),
        **{name: Entry(f"{cls.__module__}:{cls.__qualname__}", "registered") for name, cls in _registered.items()},
    }


@functools.cache
def _of_packages() -> dict[str, Entry]:
    """Return the kinds of installed packages. A kind with a name that is taken is ignored, with a warning."""
    from importlib.metadata import entry_points

    found: dict[str, Entry] = {}
    for point in sorted(
        entry_points(group=GROUP), key=lambda point: (point.dist.name if point.dist else "", point.name)
    ):
        origin = f"{point.dist.name} {point.dist.version}" if point.dist else point.value
        if point.name in BUILT_IN or point.name in found:
            other = found[point.name].origin if point.name in found else "graft"
            warnings.warn(
                f"{origin} has an adapter kind '{point.name}', but {other} has one of this name already: the new one is ignored",
                stacklevel=2,
            )
        else:
            found[point.name] = Entry(point.value, origin)
    return found


def kind_class(kind: Any) -> type[AdapterConfig]:
    """Return the config class of a kind. Raises `GraftError` for an unknown kind, with the nearest name, or if it cannot be imported."""
    known = entries()
    if not isinstance(kind, str) or kind not in known:
        raise GraftError(
            f"unknown adapter kind '{kind}'.{did_you_mean(str(kind), known)} There are: {', '.join(known)}. "
            "To use a kind of another package, install it, or register the kind with graft.register"
        )
    return _registered.get(kind) or _imported(kind, known[kind])


@functools.cache
def _imported(kind: str, entry: Entry) -> type[AdapterConfig]:
    module, _, name = entry.target.partition(":")
    if entry.origin == "graft":
        return getattr(importlib.import_module(module), name)
    try:
        found = getattr(importlib.import_module(module), name)
        declared = _declared_kind(found)
    except Exception as error:  # code of another package may raise anything
        raise GraftError(f"the adapter kind '{kind}' of {entry.origin} cannot be used: {error}") from error
    if declared != kind:
        raise GraftError(
            f"{entry.origin} has {entry.target} as kind '{kind}', but the config declares kind '{declared}': use one name in both places"
        )
    return found


def kinds() -> dict[str, type[AdapterConfig]]:
    """Return every adapter kind to choose from, by its name in YAML.

    A kind of another package that cannot be imported is left out, with a warning.
    """
    return dict(_usable())


def _usable() -> Iterator[tuple[str, type[AdapterConfig]]]:
    for kind, entry in entries().items():
        if kind in BY_REFERENCE:
            continue
        try:
            yield kind, kind_class(kind)
        except GraftError as error:
            if entry.origin == "graft":
                raise
            warnings.warn(str(error), stacklevel=3)


def by_name_alone() -> tuple[str, ...]:
    """Return the kinds of which the name says enough, because every setting has a default. A kind made of others needs those."""
    required = {name: any(field.is_required() for field in cls.model_fields.values()) for name, cls in kinds().items()}
    return tuple(name for name, needed in required.items() if not needed)


def register(config: Config) -> Config:
    """Register a kind under the name that its config declares. Returns the config class, so it works as a class decorator too.

    config: a subclass of `AdapterConfig` with a default for `kind`. A class of the same module and name replaces the one before, as when a
    cell of a notebook runs again. Raises `GraftError` for anything else, and for a name that another kind has.
    """
    kind = _declared_kind(config)
    target = f"{config.__module__}:{config.__qualname__}"
    known = entries().get(kind)
    if known is not None and known.target != target:
        raise GraftError(
            f"there is an adapter kind '{kind}' already ({known.target}, from {known.origin}): choose another name"
        )
    if known is None or kind in _registered:
        _registered[kind] = config
    return config


def _declared_kind(config: Any) -> str:
    """Return the name that a config class declares for its kind. Raises `GraftError` if it is no config class, or declares none."""
    from graft.adapters.base import AdapterConfig

    if not (isinstance(config, type) and issubclass(config, AdapterConfig)):
        raise GraftError(f"a kind must be a subclass of graft.adapters.base.AdapterConfig; given {config!r}")
    kind = config.model_fields["kind"].default
    if not isinstance(kind, str) or not kind:
        raise GraftError(
            f'{config.__name__} does not declare the name of its kind: write `kind: Literal["my-kind"] = "my-kind"`'
        )
    return kind


def readable(config: AdapterConfig) -> str | None:
    """Return why a saved adapter of this config could not be loaded again, None if it could."""
    from graft.adapters.nesting import every_config

    for each in every_config(config):
        if each.kind not in entries():
            return f"kind '{each.kind}' is not registered: call graft.register({type(each).__name__}) first"
        if kind_class(each.kind) is not type(each):
            known = entries()[each.kind]
            return f"kind '{each.kind}' is {known.target} (from {known.origin}), not {type(each).__name__}: give it another name"
    return None


def built_in_classes() -> Mapping[str, str]:
    """Return the classes of Graft's own kinds with their modules. They are the public names `graft.LoRA` and so on."""
    shown = [target for kind, target in BUILT_IN.items() if kind not in BY_REFERENCE]
    return {target.partition(":")[2]: target.partition(":")[0] for target in shown}

"""The adapter kinds by name: those of Graft, those of installed packages, and those that a program registers.

A kind is named as "module:Class" and imported when it is first used. To add a kind to Graft, write its file in `kinds/` and one line
in `BUILT_IN`. A package of its own adds one by an entry point:

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
    "stack": "graft.adapters.kinds.stack:Stack",
}
GROUP = "graft.kinds"
"""The entry-point group in which packages name their kinds."""
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
    """Every kind by its name in YAML: Graft's, then those of installed packages, then registered ones. Nothing is imported."""
    return {
        **{name: Entry(target, "graft") for name, target in BUILT_IN.items()},
        **_of_packages(),
        **{name: Entry(f"{cls.__module__}:{cls.__qualname__}", "registered") for name, cls in _registered.items()},
    }


@functools.cache
def _of_packages() -> dict[str, Entry]:
    """The kinds that installed packages bring. A name that is taken keeps its first meaning, with a warning."""
    from importlib.metadata import entry_points

    found: dict[str, Entry] = {}
    for point in sorted(
        entry_points(group=GROUP), key=lambda point: (point.dist.name if point.dist else "", point.name)
    ):
        origin = f"{point.dist.name} {point.dist.version}" if point.dist else point.value
        if point.name in BUILT_IN or point.name in found:
            other = found[point.name].origin if point.name in found else "graft"
            warnings.warn(
                f"{origin} names its adapter kind '{point.name}', which {other} has already: it is ignored",
                stacklevel=2,
            )
        else:
            found[point.name] = Entry(point.value, origin)
    return found


def kind_class(kind: Any) -> type[AdapterConfig]:
    """The config class of a kind. Raises `GraftError` for an unknown kind, with the nearest name, or one that cannot be imported."""
    if kind in _registered:
        return _registered[kind]
    known = entries()
    if kind not in known:
        raise GraftError(
            f"unknown adapter kind '{kind}'.{did_you_mean(str(kind), known)} There are: {', '.join(known)}. "
            "A kind from elsewhere has to be installed, or registered with graft.register, first"
        )
    return _imported(kind, known[kind])


@functools.cache
def _imported(kind: str, entry: Entry) -> type[AdapterConfig]:
    module, _, name = entry.target.partition(":")
    if entry.origin == "graft":
        return getattr(importlib.import_module(module), name)
    try:
        found = getattr(importlib.import_module(module), name)
        declared = _declared_kind(found)
    except Exception as error:  # a stranger's package may fail in any way
        raise GraftError(f"the adapter kind '{kind}' of {entry.origin} cannot be used: {error}") from error
    if declared != kind:
        raise GraftError(
            f"{entry.origin} names {entry.target} '{kind}', but its config says kind '{declared}': give both one name"
        )
    return found


def kinds() -> dict[str, type[AdapterConfig]]:
    """Every adapter kind by its name in YAML. A package's kind that cannot be imported is left out, with a warning."""
    return dict(_usable())


def _usable() -> Iterator[tuple[str, type[AdapterConfig]]]:
    for kind, entry in entries().items():
        try:
            yield kind, kind_class(kind)
        except GraftError as error:
            if entry.origin == "graft":
                raise
            warnings.warn(str(error), stacklevel=3)


def register(config: Config) -> Config:
    """Make a kind known under the name that its config declares; also as a class decorator. Returns the config class.

    config: a subclass of `AdapterConfig` with a default for `kind`. Registering a class of the same module and name again replaces it,
    as running a notebook's cell again does. Raises `GraftError` for anything else, and for a name that another kind has.
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
    """The name that a config class gives its kind. Raises `GraftError` for what is not a config of a kind."""
    from graft.adapters.base import AdapterConfig

    if not (isinstance(config, type) and issubclass(config, AdapterConfig)):
        raise GraftError(f"a kind is a subclass of graft.adapters.base.AdapterConfig; given {config!r}")
    kind = config.model_fields["kind"].default
    if not isinstance(kind, str) or not kind:
        raise GraftError(f'{config.__name__} does not name its kind: declare `kind: Literal["my-kind"] = "my-kind"`')
    return kind


def readable(config: AdapterConfig) -> str | None:
    """Why a saved adapter of this config could not be loaded again; None where it could."""
    for part in config.parts():
        if part.kind not in entries():
            return f"kind '{part.kind}' is not registered: call graft.register({type(part).__name__}) first"
        if kind_class(part.kind) is not type(part):
            known = entries()[part.kind]
            return f"kind '{part.kind}' is {known.target} (from {known.origin}), not {type(part).__name__}: give it another name"
    return None


def built_in_classes() -> Mapping[str, str]:
    """Class name -> module of Graft's own kinds: the public names `graft.LoRA` and so on."""
    return {target.partition(":")[2]: target.partition(":")[0] for target in BUILT_IN.values()}

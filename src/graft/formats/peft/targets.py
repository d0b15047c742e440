"""Find the modules that a PEFT config names, by PEFT's own rules.

`target_modules` is a list of names, each matching a path that is equal to it or ends in a dot and it, or a regular expression that matches
a whole path. Other fields narrow the choice. Here a name that matches nothing is an error; PEFT accepts it in silence if another matches.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import nn

from graft.architectures.layers import is_linear
from graft.architectures.walk import base_submodules
from graft.errors import GraftError, did_you_mean
from graft.formats.foreign import AdapterFile
from graft.utils.patterns import pattern


def targets(file: AdapterFile, model: nn.Module, marks: Sequence[str]) -> Iterator[tuple[str, nn.Module]]:
    """Yield (path, module) for every target, in the model's order.

    marks: what follows a module's path in the names of its tensors (`.lora_A.`). A config without `target_modules` leaves the choice to
    PEFT's defaults for the model type, and then the names of the tensors tell which modules these were.
    Raises `GraftError` for names that match nothing.
    """
    config, wanted = file.config, file.config.get("target_modules")
    if wanted is None:
        wanted = sorted({name.split(mark)[0] for name in file.left for mark in marks if mark in name})
    modules = dict(base_submodules(model))
    if wanted == "all-linear":
        head = getattr(model, "get_output_embeddings", lambda: None)()
        yield from ((path, m) for path, m in modules.items() if is_linear(m) and m is not head)
        return
    if isinstance(wanted, list | tuple):
        for name in wanted:
            if not any(path == name or path.endswith(f".{name}") for path in modules):
                near = did_you_mean(name, {path.rsplit(".", 1)[-1] for path in modules})
                raise GraftError(f"{file.folder}: target module '{name}' is not in this base.{near}")
    chosen = [(path, module) for path, module in modules.items() if _is_target(path, wanted, config)]
    if not chosen:
        raise GraftError(f"{file.folder}: target_modules {wanted!r} matches no module of this base")
    yield from chosen


def _is_target(path: str, wanted: Any, config: Mapping[str, Any]) -> bool:
    """Whether a path is matched, not excluded, and in one of the chosen layers (PEFT ignores these for a regular expression)."""
    excluded = config.get("exclude_modules")
    if excluded and matches(path, excluded):
        return False
    if not matches(path, wanted):
        return False
    layers, lists = config.get("layers_to_transform"), config.get("layers_pattern")
    if layers is None or isinstance(wanted, str):
        return True
    names = [lists] if isinstance(lists, str) else lists or [r"[^.]*"]
    found = next((match for name in names if (match := pattern(rf".*\.{name}\.(\d+)\.").match(path))), None)
    return found is not None and int(found[1]) in ([layers] if isinstance(layers, int) else layers)


def matches(path: str, wanted: str | Sequence[str]) -> bool:
    """Whether `target_modules` matches a path. wanted: a regular expression for the whole path, or a list of endings."""
    if isinstance(wanted, str):
        return pattern(wanted).fullmatch(path)
    return any(path == name or path.endswith(f".{name}") for name in wanted)


def by_pattern(path: str, patterns: Mapping[str, Any] | None, usual: Any) -> Any:
    """Return what `rank_pattern` or `alpha_pattern` gives a module, else the usual value."""
    for key, value in (patterns or {}).items():
        if pattern(rf"(.*\.)?({key})$").match(path):
            return value
    return usual

"""Find the modules that a PEFT config names, by PEFT's own rules.

`target_modules` is a list of names, each matching a path that is equal to it or ends in a dot and it, or a regular expression that matches
a whole path. Other fields narrow the choice. Here a name that matches nothing is an error; PEFT accepts it in silence if another matches.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import nn

from graft.architectures.layers import is_transposed
from graft.architectures.walk import base_submodules
from graft.errors import GraftError, did_you_mean
from graft.formats.peft.file import PeftFile
from graft.formats.peft.tied import TABLES, tied_with
from graft.utils.patterns import pattern


def targets(file: PeftFile, model: nn.Module, marks: Sequence[str]) -> Iterator[tuple[str, nn.Module]]:
    """Yield (path, module) for every target, in the model's order.

    marks: what follows a module's path in the names of its tensors (`.lora_A.`). A config without `target_modules` leaves the choice to
    PEFT's defaults for the model type, and a pattern may be for the names that the modules had in an earlier release of transformers. Then
    the names of the tensors tell which modules these were.
    Raises `GraftError` for names that match nothing.
    """
    config, wanted = file.config, file.config.get("target_modules")
    modules = dict(base_submodules(model))
    if (
        wanted is None
        or file.renamed
        and isinstance(wanted, str)
        and not any(matches(path, wanted) for path in modules)
    ):
        wanted = sorted({name.split(mark)[0] for name in file.left for mark in marks if mark in name})
    _check_layers(file, wanted)
    if isinstance(wanted, str) and wanted.lower() == "all-linear":
        wanted = _all_linear(model, modules, config)
    elif isinstance(wanted, list):
        for name in wanted:
            if not any(path == name or path.endswith(f".{name}") for path in (*modules, *file.elsewhere)):
                near = did_you_mean(name, {path.rsplit(".", 1)[-1] for path in modules})
                raise GraftError(f"{file.folder}: target module '{name}' is not in this base.{near}")
    tied = _tied_targets(model, wanted, config)
    rule = {**config, "target_modules": wanted}
    chosen = [(path, module) for path, module in modules.items() if path in tied or is_target(path, rule)]
    if not chosen and not file.elsewhere:
        raise GraftError(f"{file.folder}: target_modules {wanted!r} matches no module of this base")
    yield from chosen


def _tied_targets(model: nn.Module, wanted: Any, config: Mapping[str, Any]) -> list[str]:
    """Return the tied tables if `ensure_weight_tying` asks for them and one of them is a target and none is saved."""
    if not config.get("ensure_weight_tying") or tied_with(model, config.get("modules_to_save") or ()):
        return []
    return tied_with(
        model, [name for name in TABLES if pattern(wanted).fullmatch(name)] if isinstance(wanted, str) else wanted
    )


def _check_layers(file: PeftFile, wanted: Any) -> None:
    """Raise `GraftError` for fields about layers that PEFT refuses too."""
    layers, lists = file.config.get("layers_to_transform"), file.config.get("layers_pattern")
    if isinstance(wanted, str) and layers is not None:
        raise GraftError(f"{file.folder}: layers_to_transform needs a list in target_modules; given {wanted!r}")
    if lists and layers is None:
        raise GraftError(f"{file.folder}: layers_pattern {lists!r} has no effect without layers_to_transform")


def _all_linear(model: nn.Module, modules: Mapping[str, nn.Module], config: Mapping[str, Any]) -> list[str]:
    """Return the paths of every linear layer except the output head, or a classifier's if the file is one's."""
    head = getattr(model, "get_output_embeddings", lambda: None)()
    if head is None and config.get("task_type") == "SEQ_CLS":
        head = next((own for name in ("score", "classifier") if (own := getattr(model, name, None)) is not None), None)
    return [path for path, m in modules.items() if (isinstance(m, nn.Linear) or is_transposed(m)) and m is not head]


def is_target(path: str, config: Mapping[str, Any]) -> bool:
    """Whether a path is matched, neither excluded nor in a saved module, and in one of the chosen layers."""
    wanted = config["target_modules"]
    excluded, saved = config.get("exclude_modules"), config.get("modules_to_save") or ()
    if (excluded and matches(path, excluded)) or any(pattern(rf"(^|.*\.){name}($|\..*)").match(path) for name in saved):
        return False
    if not matches(path, wanted):
        return False
    layers = config.get("layers_to_transform")
    if isinstance(wanted, str) or path in wanted or layers is None or layers == []:
        return True
    return layer_number(path, config.get("layers_pattern")) in ([layers] if isinstance(layers, int) else layers)


def layer_number(path: str, lists: str | Sequence[str] | None) -> int | None:
    """Return the layer that PEFT takes a module to be in: the first number that follows a list of this name, or any list below the root."""
    names = [lists] if isinstance(lists, str) and lists else lists
    rules = [rf"(?:^|.*?\.){name}\.(?P<layer>\d+)\." for name in names] if names else [r".*?\.[^.]*\.(?P<layer>\d+)\."]
    found = next((match for rule in rules if (match := pattern(rule).match(path))), None)
    return None if found is None else int(found["layer"])


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
    return (patterns or {}).get(path, usual)

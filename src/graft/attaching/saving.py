"""Write an adapter to its folder, whole or not at all."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from graft.adapters.base import Adapter
from graft.adapters.files import CONFIG, WEIGHTS
from graft.adapters.nesting import every_config
from graft.adapters.registry import entries, readable
from graft.attaching.fingerprint import fingerprint
from graft.attaching.parameters import modules_of, tensors
from graft.attaching.stored import copy_strictly, write_tensors
from graft.errors import GraftError, listed
from graft.injection.state import SHARED, State, state_of, unwrapped
from graft.utils.files import checksum, explain_write_errors, keep_others, new_dir, write_json_atomic
from graft.utils.strict_json import read_object
from graft.version import __version__

TRAINER_WEIGHTS = "model.safetensors"
FORMAT_VERSION = 1
"""The version of the folder's format. A reader refuses those above its own."""


def save(model: nn.Module, name: str, folder: str | Path, *, extra_files: Mapping[str, str] | None = None) -> Path:
    """Write one adapter to a folder, atomically. The files are read again and compared before the folder appears.

    Reparametrisations are folded away (the projection of a prefix). An adapter of Graft that is there already is replaced; files that this
    does not write stay.
    extra_files: name -> text of further files (template, model card).
    Raises `GraftError` if the folder holds something else, the disk is full, or `load` could not read the adapter's kind.
    """
    root, state, folder = unwrapped(model), state_of(model), Path(folder)
    if (reason := readable(state.adapter(name).config)) is not None:
        raise GraftError(f"adapter '{name}' could not be loaded again: {reason}")
    _refuse_others(folder)
    saved = dict(_published(root, state, name))
    with new_dir(folder) as fresh:
        _write_weights(saved, fresh / WEIGHTS)
        write_json_atomic(
            fresh / CONFIG,
            {
                **_header(root, state, fresh / WEIGHTS),
                **_foreign_kinds(state, name),
                "name": name,
                "adapter": _dumped(state, name, collapsed=True),
            },
        )
        for file, text in (extra_files or {}).items():
            (fresh / file).write_text(text, encoding="utf-8")
        keep_others(folder, fresh)
    return folder


def _refuse_others(folder: Path) -> None:
    """Raise `GraftError` for a folder with anything in it that no adapter of Graft's own format is beside."""
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return
    if not folder.is_dir():
        raise GraftError(f"{folder} is a file: choose another folder")
    if not (folder / CONFIG).is_file():
        raise GraftError(f"{folder} is not empty and holds no adapter: choose another folder")
    if read_object(folder / CONFIG).get("format") != "graft":
        raise GraftError(
            f"{folder} holds an adapter that another library wrote, which would be lost: choose another folder"
        )


def save_for_trainer(root: nn.Module, folder: Path, state_dict: Mapping[str, Tensor] | None) -> None:
    """Write what a Trainer's checkpoint holds of a model with adapters: all adapters by their state-dict names, and their configs."""
    state = state_of(root)
    given = state_dict or root.state_dict()
    names = {key for name in state.adapters for key in _state_dict_of(root, state, name)}
    found = {
        key.removeprefix("module."): tensor for key, tensor in given.items() if key.removeprefix("module.") in names
    }
    if names - set(found):
        raise GraftError(
            f"the state dict to save lacks tensors of the adapters: {listed(sorted(names - set(found)), 5)}"
        )
    if (folder / TRAINER_WEIGHTS).exists() or (folder / CONFIG).exists():
        _refuse_others(folder)
    folder.mkdir(parents=True, exist_ok=True)
    _write_weights(found, folder / TRAINER_WEIGHTS)
    configs = {name: _dumped(state, name, collapsed=False) for name in state.adapters}
    write_json_atomic(folder / CONFIG, {**_header(root, state, folder / TRAINER_WEIGHTS), "adapters": configs})


def without_adapters(root: nn.Module, state_dict: Mapping[str, Tensor] | None) -> dict[str, Tensor]:
    """Return the tensors of the base in a state dict of the model (its own, if None is given)."""
    state, given = state_of(root), state_dict or root.state_dict()
    names = {key for name in state.adapters for key in _state_dict_of(root, state, name)}
    return {key: tensor for key, tensor in given.items() if key.removeprefix("module.") not in names}


def _state_dict_of(root: nn.Module, state: State, name: str) -> dict[str, Tensor]:
    """Return an adapter's tensors by their names in the model's state dict."""
    attached, found = state.adapter(name), {}
    for installed in attached.installs:
        prefix = f"{installed.site.module}.graft.{name}.{installed.key}".lstrip(".")
        found |= {f"{prefix}.{key}": tensor for key, tensor in installed.module.state_dict(keep_vars=True).items()}
    for key, shared in attached.shared.items():
        found |= {f"graft.{name}.{key}.{inner}": tensor for inner, tensor in shared.state_dict(keep_vars=True).items()}
    return found


def training_state(model: nn.Module, name: str) -> dict[str, Tensor]:
    """Return all tensors of an adapter as they train, reparametrisations included, detached, for exact resuming."""
    return {key: tensor.detach() for key, tensor in tensors(unwrapped(model), state_of(model), name)}


def load_training_state(model: nn.Module, name: str, stored: Mapping[str, Tensor]) -> None:
    """Restore what `training_state` returned. Raises `GraftError` for missing, extra or misshapen tensors."""
    copy_strictly(stored, dict(tensors(unwrapped(model), state_of(model), name)), f"the training state of '{name}'")


def _published(root: nn.Module, state: State, name: str) -> Iterable[tuple[str, Tensor]]:
    """Yield (name, tensor) of what `save` writes: `to_save` of each site, and the shared modules that a published adapter needs."""
    parts = state.adapter(name).config.parts()
    for path, module in modules_of(root, state, name):
        if isinstance(module, Adapter):
            found = module.to_save()
        else:
            part = parts[int(path.removeprefix(SHARED))]
            found = module.state_dict() if part.publishes_shared else {}
        for key, tensor in found.items():
            yield f"{path}.{key}", tensor


def _header(root: nn.Module, state: State, weights: Path) -> dict[str, Any]:
    return {
        "format": "graft",
        "format_version": FORMAT_VERSION,
        "graft_version": __version__,
        "base": fingerprint(root, state),
        "checksum": checksum(weights),
    }


def _foreign_kinds(state: State, name: str) -> dict[str, dict[str, str]]:
    """Return where kinds of other packages come from, so that a reader without them can say what is missing."""
    known = entries()
    found = {each.kind: known[each.kind] for each in every_config(state.adapter(name).config)}
    foreign = {kind: f"{entry.target} ({entry.origin})" for kind, entry in found.items() if entry.origin != "graft"}
    return {"kinds": foreign} if foreign else {}


def _dumped(state: State, name: str, *, collapsed: bool) -> dict[str, Any]:
    config = state.adapter(name).config
    return (config.collapsed() if collapsed else config).model_dump(mode="json")


def _write_weights(found: Mapping[str, Tensor], path: Path) -> None:
    """Write tensors to a file, read it again and compare. Raises `OSError` if they differ."""
    if not found:
        raise GraftError(f"there is nothing to write to {path}: the adapter has no tensors")
    contiguous = {key: tensor.detach().to("cpu").contiguous().clone() for key, tensor in found.items()}
    with explain_write_errors(path):
        write_tensors(contiguous, path)
    again = load_file(path)
    if set(again) != set(contiguous) or not all(
        torch.equal(again[key], contiguous[key]) for key in again if not again[key].isnan().any()
    ):
        raise OSError(f"{path} does not hold what was written to it")

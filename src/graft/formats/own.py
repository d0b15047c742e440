"""Adapters on disk: a folder with `adapter_config.json` and `adapter_model.safetensors`, written whole and read strictly.

Tensor names are `<module>.<site part>.<parameter>`, e.g. `model.layers.0.self_attn.q_proj.linear.A`. Nothing is ever unpickled.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from graft.adapters.filling import to_be_filled
from graft.adapters.parsing import parse
from graft.adapters.registry import entries
from graft.attaching.attach import Model, attach, detach
from graft.attaching.fingerprint import check_base
from graft.attaching.parameters import tensors
from graft.attaching.saving import CONFIG, TRAINER_WEIGHTS, WEIGHTS, _state_dict_of, copy_strictly
from graft.errors import GraftError, did_you_mean
from graft.injection.state import state_of, unwrapped


def load_own(model: Model, folder: Path, header: Mapping[str, Any], name: str | None, any_base: bool) -> Model:
    """Attach the adapter of a folder that Graft wrote. header: what `read_header` gave of it."""
    for kind, source in header.get("kinds", {}).items():
        if kind not in entries():
            raise GraftError(
                f"{folder} holds an adapter of kind '{kind}', which Graft does not have: it comes from {source}. Install that package, "
                "or call graft.register with its config class, first"
            )
    root = unwrapped(model)
    check_base(header["base"], root, root.__dict__.get("graft_state"), str(folder)) if not any_base else None
    if "adapters" in header:
        return _load_trainer_folder(model, folder, header, name)
    own_name = name or header["name"]
    with to_be_filled():
        attach(model, {own_name: parse(header["adapter"])})
    _fill(
        model,
        own_name,
        lambda: copy_strictly(_file(folder / WEIGHTS), dict(tensors(root, state_of(model), own_name)), str(folder)),
    )
    return model


def _fill(model: nn.Module, name: str, copy: Any) -> None:
    """Fill a fresh adapter; take it off again when that fails."""
    try:
        copy()
    except BaseException:
        detach(model, name)
        raise


def _load_trainer_folder(model: Model, folder: Path, header: Mapping[str, Any], name: str | None) -> Model:
    wanted = header["adapters"]
    if name is not None and name not in wanted and len(wanted) > 1:
        raise GraftError(f"{folder} holds the adapters {', '.join(wanted)}, not '{name}'.{did_you_mean(name, wanted)}")
    chosen = (
        {name: next(iter(wanted))}
        if name is not None and name not in wanted
        else {each: each for each in wanted if name in (None, each)}
    )
    stored = _file(folder / TRAINER_WEIGHTS)
    for new, old in chosen.items():
        with to_be_filled():
            attach(model, {new: parse(wanted[old])})
        root, marker = unwrapped(model), f".{old}."
        own = {key: tensor for key, tensor in stored.items() if marker in _from_graft(key)}
        places = {key: tensor for key, tensor in _state_dict_of(root, state_of(model), new).items()}
        renamed = {_renamed(key, old, new): tensor for key, tensor in own.items()}
        _fill(model, new, lambda renamed=renamed, places=places: copy_strictly(renamed, places, str(folder)))
    return model


def _from_graft(key: str) -> str:
    """The part of a state-dict name from Graft's own container on."""
    return ("." + key)[("." + key).rfind(".graft.") + len(".graft") :]


def _renamed(key: str, old: str, new: str) -> str:
    head = key[: len(key) - len(_from_graft(key))]
    return head + f".{new}." + _from_graft(key).removeprefix(f".{old}.")


def read_header(folder: Path) -> dict[str, Any]:
    path = folder / CONFIG
    if not folder.is_dir():
        near = did_you_mean(folder.name, [p.name for p in folder.parent.iterdir()]) if folder.parent.is_dir() else ""
        raise GraftError(f"no folder {folder}.{near}")
    if not path.is_file():
        raise GraftError(
            f"{folder} holds no adapter: {CONFIG} is missing (found: {', '.join(sorted(p.name for p in folder.iterdir())) or 'nothing'})"
        )
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise GraftError(f"{path} is not JSON: {error}") from error


def _file(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise GraftError(f"{path} is missing")
    try:
        return load_file(path)
    except SafetensorError as error:
        raise GraftError(f"{path} is damaged or cut short ({path.stat().st_size} bytes): {error}") from error

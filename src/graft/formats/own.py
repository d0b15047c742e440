"""Read Graft's own adapter folders: `adapter_config.json` beside `adapter_model.safetensors`. Nothing is ever unpickled.

Tensor names are `<module>.<site part>.<parameter>`, e.g. `model.layers.0.self_attn.q_proj.linear.A`.

A checkpoint of transformers' Trainer holds all adapters of a model in one `model.safetensors`, under their state-dict names, e.g.
`model.layers.0.self_attn.q_proj.graft.french.linear.A` for the adapter `french`.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
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
    """Attach the adapter of a folder that Graft wrote. header: the result of `read_header`."""
    for kind, source in header.get("kinds", {}).items():
        if kind not in entries():
            raise GraftError(
                f"{folder} holds an adapter of kind '{kind}', which Graft does not have: it comes from {source}. Install that package, "
                "or call graft.register with its config class, first"
            )
    root = unwrapped(model)
    if not any_base:
        check_base(header["base"], root, root.__dict__.get("graft_state"), str(folder))
    if "adapters" in header:
        return _load_trainer_folder(model, folder, header, name)
    own_name = name or header["name"]
    with to_be_filled():
        attach(model, {own_name: parse(header["adapter"])})
    with detached_on_error(model, own_name):
        copy_strictly(_tensors(folder / WEIGHTS), dict(tensors(root, state_of(model), own_name)), str(folder))
    return model


@contextmanager
def detached_on_error(model: nn.Module, name: str) -> Iterator[None]:
    """Detach the adapter if the block of code that fills it fails, so that the model is unchanged."""
    try:
        yield
    except BaseException:
        detach(model, name)
        raise


def _load_trainer_folder(model: Model, folder: Path, header: Mapping[str, Any], name: str | None) -> Model:
    """Attach the adapters of a Trainer checkpoint: all of them, or the one called `name`. A single adapter may get another name."""
    configs = header["adapters"]
    if name is not None and name not in configs and len(configs) > 1:
        raise GraftError(
            f"{folder} holds the adapters {', '.join(configs)}, not '{name}'.{did_you_mean(name, configs)}"
        )
    # The name to attach under -> the name in the file.
    chosen = (
        {name: next(iter(configs))}
        if name is not None and name not in configs
        else {each: each for each in configs if name in (None, each)}
    )
    stored = _tensors(folder / TRAINER_WEIGHTS)
    for new, old in chosen.items():
        with to_be_filled():
            attach(model, {new: parse(configs[old])})
        places = _state_dict_of(unwrapped(model), state_of(model), new)
        own = {_renamed(key, old, new): tensor for key, tensor in stored.items() if f".{old}." in _after_graft(key)}
        with detached_on_error(model, new):
            copy_strictly(own, places, str(folder))
    return model


def _after_graft(key: str) -> str:
    """Return what follows `graft` in a state-dict name: `model.q_proj.graft.french.linear.A` -> `.french.linear.A`."""
    return ("." + key)[("." + key).rfind(".graft.") + len(".graft") :]


def _renamed(key: str, old: str, new: str) -> str:
    """Replace the adapter's name in a state-dict name."""
    after = _after_graft(key)
    return key.removesuffix(after) + f".{new}." + after.removeprefix(f".{old}.")


def read_header(folder: Path) -> dict[str, Any]:
    """Read a folder's `adapter_config.json`. Raises `GraftError` when the folder or the file is missing, or the file is not JSON."""
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


def _tensors(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise GraftError(f"{path} is missing")
    try:
        return load_file(path)
    except SafetensorError as error:
        raise GraftError(f"{path} is damaged or cut short ({path.stat().st_size} bytes): {error}") from error

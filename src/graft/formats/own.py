"""Read Graft's own adapter folders: `adapter_config.json` beside `adapter_model.safetensors`. Nothing is ever unpickled.

Tensor names are `<module>.<site part>.<parameter>`, e.g. `model.layers.0.self_attn.q_proj.linear.A`.

A checkpoint of transformers' Trainer holds all adapters of a model in one `model.safetensors`, under their state-dict names, e.g.
`model.layers.0.self_attn.q_proj.graft.french.linear.A` for the adapter `french`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from graft.adapters.base import AdapterConfig
from graft.adapters.files import CONFIG, WEIGHTS
from graft.adapters.parsing import parse
from graft.adapters.registry import entries
from graft.attaching.attach import Model, detach
from graft.attaching.fingerprint import check_base
from graft.attaching.saving import FORMAT_VERSION, TRAINER_WEIGHTS
from graft.attaching.stored import load_tensors
from graft.errors import GraftError, did_you_mean
from graft.formats.filling import attach_filled
from graft.injection.state import unwrapped
from graft.utils.files import checksum
from graft.utils.strict_json import read_object
from graft.version import __version__

FIELDS: Mapping[str, type] = {
    "format": str, "format_version": int, "graft_version": str, "base": dict, "kinds": dict, "checksum": str,
    "name": str, "adapter": dict, "adapters": dict,
}  # fmt: skip
"""The fields of a config, with their types. `name` and `adapter` are those of one adapter, `adapters` those of a Trainer's checkpoint."""


def load_own(
    model: Model,
    folder: Path,
    header: Mapping[str, Any],
    name: str | None,
    any_base: bool,
    moved: Mapping[str, str | Path],
) -> Model:
    """Attach the adapter of a folder that Graft wrote. header: the result of `read_header`. moved: as in `graft.load`.

    Raises `GraftError` for a format of the future, a field that is unknown or missing, another base, and weights that do not fit.
    """
    _check_fields(folder, header)
    header = _at_new_places(folder, header, moved)
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
    path = folder / WEIGHTS
    attach_filled(model, name or header["name"], _config(folder, header["adapter"]), load_tensors(path), str(folder),
                  lambda: _verify(path, header))  # fmt: skip
    return model


def _check_fields(folder: Path, header: Mapping[str, Any]) -> None:
    version, writer = header.get("format_version", 1), header.get("graft_version", "unknown")
    if isinstance(version, int) and version > FORMAT_VERSION:
        raise GraftError(
            f"{folder} is written in version {version} of Graft's format (by graft {writer}), and this graft ({__version__}) reads "
            f"versions up to {FORMAT_VERSION}: install a newer graft"
        )
    for key, value in header.items():
        if key not in FIELDS:
            raise GraftError(f"{folder / CONFIG} has a field '{key}', which Graft does not write: {', '.join(FIELDS)}")
        if not isinstance(value, FIELDS[key]) or isinstance(value, bool) or (key == "format_version" and value < 1):
            raise GraftError(f"{folder / CONFIG}: '{key}' cannot be {value!r}: it is of type {FIELDS[key].__name__}")
    lacking = [key for key in ("base", *(() if "adapters" in header else ("name", "adapter"))) if key not in header]
    if lacking:
        raise GraftError(f"{folder / CONFIG} lacks the field '{lacking[0]}'")
    if not {"model", "shape", "digest"} <= header["base"].keys() or not isinstance(header["base"]["shape"], dict):
        raise GraftError(f"{folder / CONFIG}: 'base' is no record of a base: it needs model, shape and digest")


def _at_new_places(folder: Path, header: Mapping[str, Any], moved: Mapping[str, str | Path]) -> Mapping[str, Any]:
    """Replace the folders that adapters refer to. Raises `GraftError` for an old place to which none refers."""
    met: set[str] = set()

    def walk(value: Any) -> Any:
        if isinstance(value, list):
            return [walk(each) for each in value]
        if not isinstance(value, Mapping):
            return value
        found = {key: walk(each) for key, each in value.items()}
        if found.get("kind") == "trained":
            met.add(old := str(found.get("folder")))
            found |= {"folder": str(Path(moved[old]).absolute())} if old in moved else {}
        return found

    placed = {key: walk(value) if key in ("adapter", "adapters") else value for key, value in header.items()}
    if unknown := [old for old in moved if old not in met]:
        said = f"it refers to {', '.join(sorted(met))}" if met else "it refers to no other folder"
        raise GraftError(f"moved: the adapter in {folder} does not refer to {unknown[0]}; {said}")
    return placed


def _config(folder: Path, adapter: Any) -> AdapterConfig:
    found = parse(adapter)
    if not isinstance(found, AdapterConfig):
        raise GraftError(f"{folder / CONFIG} names a preset in place of an adapter's fields")
    return found


def _verify(path: Path, header: Mapping[str, Any]) -> None:
    """Raise `GraftError` if the weights are not those that were written with the config. Folders of older releases have no checksum."""
    written = header.get("checksum")
    if written is not None and checksum(path) != written:
        raise GraftError(
            f"{path} is not the file that was written with its config (its checksum is {checksum(path)}, not {written}): it was damaged or "
            f"replaced. If you changed it yourself, remove `checksum` from {CONFIG}"
        )


def _load_trainer_folder(model: Model, folder: Path, header: Mapping[str, Any], name: str | None) -> Model:
    """Attach the adapters of a Trainer checkpoint: all of them, or the one called `name`. A single adapter may get another name."""
    configs, path = header["adapters"], folder / TRAINER_WEIGHTS
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
    by_adapter = _by_adapter(load_tensors(path), configs, folder)
    done: list[str] = []
    try:
        for new, old in chosen.items():
            config = _config(folder, configs[old])
            attach_filled(model, new, config, by_adapter[old], str(folder), lambda: _verify(path, header))
            done.append(new)
    except BaseException:
        for each in done:
            detach(model, each)
        raise
    return model


def _by_adapter(stored: Mapping[str, Tensor], names: Iterable[str], folder: Path) -> dict[str, dict[str, Tensor]]:
    """Sort the tensors of a Trainer checkpoint by adapter: `model.q_proj.graft.french.linear.A` is French's `model.q_proj.linear.A`.

    Raises `GraftError` for a tensor that belongs to none of the adapters.
    """
    found: dict[str, dict[str, Tensor]] = {name: {} for name in names}
    for key, tensor in stored.items():
        before, mark, after = f".{key}".rpartition(".graft.")
        name, _, inner = after.partition(".")
        if not mark or name not in found:
            raise GraftError(f"{folder} does not fit its config: tensor '{key}' belongs to none of its adapters")
        found[name][f"{before}.{inner}".lstrip(".")] = tensor
    return found


def coupling_of(folders: Iterable[Path]) -> str | None:
    """Return the coupling of the reversible base that all adapters in these folders were trained on, None if any was not."""
    headers = [read_header(folder) for folder in folders if (folder / CONFIG).is_file()]
    found = {header["base"].get("reversible") if isinstance(header.get("base"), dict) else None for header in headers}
    return found.pop() if len(found) == 1 else None


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
    return read_object(path)

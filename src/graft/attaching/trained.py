"""Fill the adapters that are there by reference (kind `trained`) from their folders, which have to hold the same weights as before."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from graft.adapters.base import AdapterConfig
from graft.adapters.kinds.trained import CONFIG, WEIGHTS, HeldShared, Trained
from graft.adapters.nesting import every_config
from graft.architectures.site import SiteKeys
from graft.attaching.fingerprint import check_base
from graft.attaching.stored import copy_strictly, load_tensors
from graft.errors import GraftError
from graft.injection.state import SHARED, AttachedAdapter, Installed, State
from graft.utils.files import checksum
from graft.utils.strict_json import read_object


def check_references(config: AdapterConfig) -> None:
    """Raise `GraftError` for an adapter by reference that is there twice, whose folder is gone, or that holds other weights by now."""
    found = [each for each in every_config(config) if isinstance(each, Trained)]
    for number, part in enumerate(found):
        if any((part.folder, part.part) == (each.folder, each.part) for each in found[:number]):
            raise GraftError(f"the adapter in {part.folder} is named twice: name it once")
        path = Path(part.folder) / WEIGHTS
        said = f"this adapter was trained on top of the one in {part.folder}"
        if not path.is_file():
            raise GraftError(
                f"{said}, which is not there ({path} is missing): bring the folder back. The digest of its weights is {part.digest}"
            )
        if (now := checksum(path)) != part.digest:
            raise GraftError(
                f"{said}, which holds other weights by now (digest {now}, not {part.digest}): bring the former ones back"
            )


def fill_references(root: nn.Module, state: State, attached: AttachedAdapter) -> None:
    """Copy the tensors of adapters by reference into the modules that were built for them.

    Raises `GraftError` for an adapter of another base, and for tensors that are missing, extra or misshapen.
    """
    parts = attached.config.parts()
    held = [found for each in attached.installs for found in _held(each)]
    for name in dict.fromkeys(config.folder for config, _, _ in held):
        folder, keys = Path(name), SiteKeys()
        check_base(read_object(folder / CONFIG)["base"], root, state, name)
        places: dict[str, Tensor] = {}
        modules = [(each.site, module.of) for config, each, module in held if config.folder == name]
        for site, module in modules:
            path = f"{site.module}.{keys.take(site.module, site.part)}".lstrip(".")
            places |= {f"{path}.{key}": tensor for key, tensor in module.state_dict(keep_vars=True).items()}
        for key, shared in attached.shared.items():
            part = parts[int(key.removeprefix(SHARED))]
            if isinstance(shared, HeldShared) and isinstance(part, Trained) and part.folder == name:
                inside = shared.held.state_dict(keep_vars=True)
                places |= {f"{SHARED}{part.part}.{key}": tensor for key, tensor in inside.items()}
        copy_strictly(load_tensors(folder / WEIGHTS), places, name)
        for _, module in modules:
            module.check_filled()


def _held(installed: Installed) -> Iterator[tuple[Trained, Installed, Any]]:
    """Yield each adapter by reference at a site, alone or in a composite: its config, where it is installed, and its module."""
    if isinstance(installed.config, Trained):
        yield installed.config, installed, installed.module
        return
    for config, module in zip(installed.config.inner(), installed.module.inner().values(), strict=False):
        if isinstance(config, Trained):
            yield config, installed, module

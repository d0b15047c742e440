"""Fill the adapters that are there by reference (kind `trained`) from their folders, which have to hold the same weights as before."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor, nn

from graft.adapters.base import AdapterConfig
from graft.adapters.kinds.trained import CONFIG, WEIGHTS, HeldShared, Trained
from graft.architectures.site import SiteKeys
from graft.attaching.fingerprint import check_base
from graft.attaching.stored import copy_strictly, load_tensors
from graft.errors import GraftError
from graft.injection.state import SHARED, AttachedAdapter, State
from graft.utils.files import checksum
from graft.utils.strict_json import read_object


def check_references(config: AdapterConfig) -> None:
    """Raise `GraftError` for an adapter by reference that is there twice, whose folder is gone, or that holds other weights by now."""
    found = [part for part in config.parts() if isinstance(part, Trained)]
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
    held = [(each.config, each) for each in attached.installs if isinstance(each.config, Trained)]
    for name in dict.fromkeys(config.folder for config, _ in held):
        folder, keys = Path(name), SiteKeys()
        check_base(read_object(folder / CONFIG)["base"], root, state, name)
        places: dict[str, Tensor] = {}
        modules = [each for config, each in held if config.folder == name]
        for each in modules:
            path = f"{each.site.module}.{keys.take(each.site.module, each.site.part)}".lstrip(".")
            inner: nn.Module = each.module.of  # pyright: ignore[reportAttributeAccessIssue, reportAssignmentType]
            places |= {f"{path}.{key}": tensor for key, tensor in inner.state_dict(keep_vars=True).items()}
        for key, shared in attached.shared.items():
            part = parts[int(key.removeprefix(SHARED))]
            if isinstance(shared, HeldShared) and isinstance(part, Trained) and part.folder == name:
                inside = shared.held.state_dict(keep_vars=True)
                places |= {f"{SHARED}{part.part}.{key}": tensor for key, tensor in inside.items()}
        copy_strictly(load_tensors(folder / WEIGHTS), places, name)
        for each in modules:
            each.module.check_filled()

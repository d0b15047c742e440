"""Fill the adapters that are there by reference (kind `trained`) from their folders, which have to hold the same weights as before."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from graft.adapters.base import Adapter, AdapterConfig, AdapterModule
from graft.adapters.files import CONFIG, WEIGHTS
from graft.adapters.kinds.trained import Trained
from graft.adapters.nesting import every_config
from graft.architectures.site import SiteKeys
from graft.attaching.fingerprint import check_base
from graft.attaching.stored import copy_strictly, load_tensors
from graft.errors import GraftError
from graft.injection.state import SHARED, AttachedAdapter, State
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
                f"{said}, which is not there ({path} is missing): bring the folder back, or name its new place with "
                f"graft.load(..., moved={{'{part.folder}': 'NEW'}}), or in `folder` of the adapter's {CONFIG}. The digest of its weights "
                f"is {part.digest}"
            )
        if (now := checksum(path)) != part.digest:
            raise GraftError(
                f"{said}, which holds other weights by now (digest {now}, not {part.digest}): bring the former ones back"
            )


def fill_references(root: nn.Module, state: State, attached: AttachedAdapter) -> None:
    """Copy the tensors of adapters by reference into the modules that were built for them.

    Raises `GraftError` for an adapter of another base, and for tensors that are missing, extra or misshapen.
    """
    held = [(*pair, each.site) for each in attached.installs for pair in _held(each.config, each.module)]
    parts = attached.config.parts()
    shares = [pair for n, part in enumerate(parts) for pair in _held(part, attached.shared.get(f"{SHARED}{n}"))]
    for name in dict.fromkeys(config.folder for config, _, _ in held):
        folder, keys = Path(name), SiteKeys()
        check_base(read_object(folder / CONFIG)["base"], root, state, name)
        places: dict[str, Tensor] = {}
        modules = [(module, site) for config, module, site in held if config.folder == name]
        for module, site in modules:
            path = f"{site.module}.{keys.take(site.module, site.part)}".lstrip(".")
            places |= {f"{path}.{key}": tensor for key, tensor in module.held.state_dict(keep_vars=True).items()}
        for config, shared in shares:
            if config.folder == name:
                inside = shared.held.state_dict(keep_vars=True)
                places |= {f"{SHARED}{config.part}.{key}": tensor for key, tensor in inside.items()}
        copy_strictly(load_tensors(folder / WEIGHTS), places, name)
        for module, _ in modules:
            module.check_filled()


def _held(config: AdapterConfig, module: AdapterModule | None) -> Iterator[tuple[Trained, Any]]:
    """Yield (config, module) of an adapter by reference, or of those inside a kind made of others; of shared modules likewise.

    Raises `GraftError` for a kind that builds more, or fewer, modules of what is in it than one.
    """
    if isinstance(config, Trained):
        if module is not None:
            held: Any = module
            yield config, held
            yield from _held(config.of, held.held)  # which may refer to others in its turn
        return
    if not any(isinstance(each, Trained) for each in every_config(config)):
        return
    if len(config.inner()) == 1 and not isinstance(module, Adapter):  # what the sites of the inner kind share
        yield from _held(config.inner()[0], module)
        return
    inside = {} if module is None else module.inner()
    if isinstance(module, Adapter):
        if len(inside) != len(config.inner()):
            raise GraftError(
                f"kind {config.kind} cannot hold a trained adapter by reference: name it in a list, beside others"
            )
        for each, own in zip(config.inner(), inside.values(), strict=True):
            yield from _held(each, own)
        return
    for number, each in enumerate(config.inner()):  # shared modules of parts have the numbers of these
        yield from _held(each, inside.get(str(number)))

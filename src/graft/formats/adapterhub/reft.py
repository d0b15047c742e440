"""AdapterHub's ReFT, read and written.

The library has a unit 0 for the first positions and a unit 1 for the last, or one unit 0 for both if they are tied. Untied, it keeps both
even if one of them never acts, because no position is its own; Graft then has the other one only.

Legend: R rank, D hidden size.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from graft.adapters.kinds.reft import ReFT, orthonormal_rows
from graft.errors import GraftError
from graft.formats.adapterhub.file import HubFile
from graft.formats.adapterhub.places import T5_TYPES, differing, model_type, refuse
from graft.formats.composing import Piece
from graft.formats.folder import Folder, SiteAdapter
from graft.injection.state import site_table_of


def read_reft(file: HubFile, config: Mapping[str, Any]) -> list[Piece]:
    """Read LoReFT and NoReFT. The file does not tell DiReFT from NoReFT, because the library does not write the field."""
    prefix, suffix, tied = config["prefix_positions"], config["suffix_positions"], bool(config["tied_weights"])
    if config.get("non_linearity") is not None:
        raise GraftError(f"{file.folder}: ReFT with a non-linearity has no equal in Graft")
    form = "loreft" if config["orthogonality"] else "noreft"
    if config.get("subtract_projection") is False:
        form = "direft"
    like = ReFT(
        form=form, rank=config["r"], prefix=prefix, suffix=suffix, tied=tied, dropout=config.get("dropout") or 0.0
    )
    if form == "noreft" and config.get("subtract_projection") is None:
        warnings.warn(
            f"{file.folder} may be DiReFT or NoReFT: the library does not write which. It is read as NoReFT, as the library itself does",
            stacklevel=2,
        )
    units, layers = _units(prefix, suffix, tied), config.get("layers", "all")
    pieces = []
    for block in file.site_table.blocks:
        if layers != "all" and block.number not in layers:
            continue
        tensors: dict[str, Tensor] = {}
        stored = sorted({key.split(".units.")[1].split(".")[0] for key in file.left
                         if key.startswith(f"{block.path}.reft_layer.refts.{file.name}.units.")})  # fmt: skip
        for number in stored:
            unit = f"{block.path}.reft_layer.refts.{file.name}.units.{number}"
            own = {"W.weight": file.take(f"{unit}.learned_source.weight"), "W.bias": file.take(f"{unit}.learned_source.bias"),
                   "R": _orthonormal(file, unit) if form == "loreft" else file.take(f"{unit}.projection.weight")}  # fmt: skip
            if int(number) in units:
                tensors |= {f"units.{units.index(int(number))}.{name}": tensor for name, tensor in own.items()}
        pieces.append(Piece(block.path, like, tensors, "layer"))
    return pieces


def _units(prefix: int, suffix: int, tied: bool) -> list[int]:
    """Return the library's numbers of the units that Graft has, in Graft's order: with suffix positions only, [1]."""
    return [0] if tied else [number for number, length in enumerate((prefix, suffix)) if length]


def _orthonormal(file: HubFile, unit: str) -> Tensor:
    """Return R [R, D] from the two tensors that torch's orthogonal parametrisation stores for it."""
    name = f"{unit}.projection.parametrizations.weight"
    original, base = file.take(f"{name}.original"), file.take(f"{name}.0.base")
    if file.missing or original.ndim != 2 or not original.numel():
        return original  # `finish` names what is missing, and filling the adapter the shape that it needs
    linear: Any = nn.utils.parametrizations.orthogonal(nn.Linear(original.shape[1], original.shape[0], bias=False))
    needed = linear.parametrizations.weight[0].base.shape
    if base.shape != needed:
        raise GraftError(f"{file.folder}: {name}.0.base has shape {list(base.shape)}, but {list(needed)} is needed")
    linear.load_state_dict({"parametrizations.weight.original": original, "parametrizations.weight.0.base": base})
    return linear.weight.detach().clone()


@torch.no_grad()
def write_reft(root: nn.Module, adapters: Sequence[SiteAdapter], folder: Folder, name: str) -> dict[str, Any]:
    """Write LoReFT and NoReFT. Return the config."""
    config: Any = adapters[0].config
    blocks = {block.path: block.number for block in site_table_of(root).blocks}
    refuse("ReFT", {
        "settings that differ between sites": differing(adapters),
        "direft, which its file does not tell from noreft": config.form == "direft", "positions: all": config.positions == "all",
        "sites other than layer": any(adapter.path not in blocks for adapter in adapters),
        f"a base of type {model_type(root)}, as far as Graft knows": model_type(root) in T5_TYPES,
    })  # fmt: skip
    units = _units(config.prefix, config.suffix, config.tied)
    for adapter in adapters:
        for number in range(1 if config.tied else 2):
            # A unit that never acts is a copy of the other one.
            unit = adapter.module.units[units.index(number) if number in units else 0]
            prefix = f"{adapter.path}.reft_layer.refts.{name}.units.{number}."
            folder.tensors |= {f"{prefix}learned_source.{end}": getattr(unit.W, end) for end in ("weight", "bias")}
            projection = _projection(unit, config.form)
            folder.tensors |= {f"{prefix}projection.{end}": tensor for end, tensor in projection.items()}
    layers = sorted(blocks[adapter.path] for adapter in adapters)
    return {"architecture": "reft", "layers": "all" if layers == sorted(blocks.values()) else layers, "prefix_positions": config.prefix,
            "suffix_positions": config.suffix, "r": config.rank, "orthogonality": config.form == "loreft", "tied_weights": config.tied,
            "dropout": config.dropout, "non_linearity": None, "dtype": None, "init_weights_seed": None, "output_reft": True}  # fmt: skip


def _projection(unit: Any, form: str) -> dict[str, Tensor]:
    """Return R, for LoReFT in the two tensors of torch's orthogonal parametrisation."""
    if form != "loreft":
        return {"weight": unit.R}
    R = orthonormal_rows(unit.R)
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(0)  # torch completes R to a basis by random vectors
        linear: Any = nn.utils.parametrizations.orthogonal(nn.Linear(R.shape[1], R.shape[0], bias=False))
        linear.weight = R.float().cpu()
    stored = linear.state_dict()
    return {
        f"parametrizations.weight.{end}": stored[f"parametrizations.weight.{end}"] for end in ("original", "0.base")
    }

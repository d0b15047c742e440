"""PEFT's relatives of LoRA, read and written: VeRA, LoHa and LoKr.

Legend: R rank, I input, O output features.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from graft.adapters.kinds.loha import LoHa
from graft.adapters.kinds.lokr import LoKr
from graft.adapters.kinds.vera import VeRA
from graft.architectures.layers import is_transposed
from graft.errors import GraftError
from graft.formats.composing import Piece
from graft.formats.folder import Folder, SiteAdapter
from graft.formats.peft.allowed import whole_layers
from graft.formats.peft.file import PeftFile
from graft.formats.peft.naming import patterns, shortest_names
from graft.formats.peft.targets import by_pattern, targets

VERA = {"d": "vera_lambda_d", "b": "vera_lambda_b"}


def read_vera(file: PeftFile, model: nn.Module) -> list[Piece]:
    """Read VeRA: two vectors per module, and the shared matrices if the file has them. If not, they are drawn again from the seed."""
    config = file.config
    saved = bool(config.get("save_projection", True))
    like = VeRA(rank=file.field("r"), dropout=config.get("vera_dropout") or 0.0, d_initial=config.get("d_initial", 0.1),
                seed=config.get("projection_prng_key") or 0, save_projection=saved)  # fmt: skip
    shared = {name: file.take(f"vera_{name}") for name in "AB"} if saved else {}
    return [
        Piece(path, like, {ours: file.take(f"{path}.{theirs}") for ours, theirs in VERA.items()}, shared=shared)
        for path, _ in targets(file, model, (".vera_lambda_",))
    ]


def write_vera(root: nn.Module, adapters: Sequence[SiteAdapter], folder: Folder) -> None:
    """Write VeRA. The shared matrices belong to no module, so their names begin otherwise."""
    config: Any = adapters[0].config
    paths = whole_layers(root, adapters, "VeRA", transposed=True)
    folder.config |= {
        "peft_type": "VERA", "r": config.rank, "vera_dropout": config.dropout, "d_initial": config.d_initial, "bias": "none",
        "projection_prng_key": config.seed, "save_projection": config.save_projection, "init_weights": True,
        "fan_in_fan_out": any(is_transposed(root.get_submodule(path)) for path in paths), **shortest_names(root, paths),
    }  # fmt: skip
    for adapter in adapters:
        own = dict(adapter.module.named_parameters())
        folder.tensors |= {f"{adapter.path}.{theirs}": own[ours] for ours, theirs in VERA.items()}
    if config.save_projection:
        (shared,) = adapters[0].module._shared
        folder.unprefixed |= {f"base_model.vera_{name}": getattr(shared, name) for name in "AB"}


def read_loha(file: PeftFile, model: nn.Module) -> list[Piece]:
    """Read LoHa at linear layers."""
    names = ("w1_a", "w1_b", "w2_a", "w2_b")
    return [
        Piece(path, LoHa(**_fields(file, path)), {name: file.take(f"{path}.hada_{name}") for name in names})
        for path, _ in targets(file, model, (".hada_",))
    ]


def read_lokr(file: PeftFile, model: nn.Module) -> list[Piece]:
    """Read LoKr at linear layers. The names of the tensors tell which of the two factors are low-rank products."""
    factor = file.config.get("decompose_factor", -1)
    more = {
        "decompose_both": bool(file.config.get("decompose_both")),
        "factor": None if factor in (-1, None) else factor,
    }
    pieces = []
    for path, _ in targets(file, model, (".lokr_",)):
        prefix = f"{path}.lokr_"
        names = [name.removeprefix(prefix) for name in list(file.left) if name.startswith(prefix)] or ["w1", "w2"]
        pieces.append(
            Piece(path, LoKr(**_fields(file, path), **more), {name: file.take(prefix + name) for name in names})
        )
    return pieces


def _fields(file: PeftFile, path: str) -> dict[str, Any]:
    """Return the rank and alpha of a module. Raises `GraftError` for the kinds of dropout that Graft lacks."""
    config = file.config
    for field in ("rank_dropout", "module_dropout"):
        if config.get(field):
            raise GraftError(
                f"{file.folder}: {field} has no equal in Graft. It acts in training only: set it to 0 in the config to load the adapter"
            )
    return {
        "rank": by_pattern(path, config.get("rank_pattern"), file.field("r")),
        "alpha": float(by_pattern(path, config.get("alpha_pattern"), file.field("alpha"))),
    }


def write_loha(root: nn.Module, adapters: Sequence[SiteAdapter], folder: Folder) -> None:
    """Write LoHa."""
    _write_products(root, adapters, folder, "LOHA", "hada_")


def write_lokr(root: nn.Module, adapters: Sequence[SiteAdapter], folder: Folder) -> None:
    """Write LoKr."""
    config: Any = adapters[0].config
    _write_products(root, adapters, folder, "LOKR", "lokr_")
    folder.config |= {"decompose_both": config.decompose_both, "decompose_factor": config.factor or -1}


def _write_products(root: nn.Module, adapters: Sequence[SiteAdapter], folder: Folder, kind: str, mark: str) -> None:
    """Write a kind that is a product of named factors. mark: what comes before their names."""
    own = (
        "rank",
        "alpha",
        "rank_pattern",
        "alpha_pattern",
        "dropout",
    )  # the first four have patterns; dropout is not written
    paths = whole_layers(root, adapters, kind, differ=own)
    ranks, alphas = (
        {adapter.path: getattr(adapter.config, name) for adapter in adapters} for name in ("rank", "alpha")
    )
    rank, rank_pattern = patterns(ranks)
    alpha, alpha_pattern = patterns(alphas)
    if any(adapter.config.dropout for adapter in adapters):
        folder.notes.append(f"dropout is not written: PEFT's {kind} has none on the input")
    folder.config |= {"peft_type": kind, "r": rank, "alpha": alpha, "rank_pattern": rank_pattern, "alpha_pattern": alpha_pattern,
                      "init_weights": True, **shortest_names(root, paths)}  # fmt: skip
    for adapter in adapters:
        folder.tensors |= {f"{adapter.path}.{mark}{name}": tensor for name, tensor in adapter.module.named_parameters()}

"""PEFT's VeRA, LoHa and LoKr, read and written.

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
from graft.formats.foreign import Checkpoint
from graft.formats.peft.folder import Folder, Held
from graft.formats.peft.naming import patterns, shortest_names
from graft.formats.peft.targets import by_pattern, targets

VERA = {"d": "vera_lambda_d", "b": "vera_lambda_b"}


def read_vera(file: Checkpoint, model: nn.Module) -> list[Piece]:
    """Two vectors per module, and the shared matrices where the file has them; else they are drawn again from the seed."""
    config = file.config
    saved = bool(config.get("save_projection", True))
    like = VeRA(rank=file.field("r"), dropout=config.get("vera_dropout") or 0.0, d_initial=config.get("d_initial", 0.1),
                seed=config.get("projection_prng_key") or 0, save_projection=saved)  # fmt: skip
    shared = {name: file.take(f"vera_{name}") for name in "AB"} if saved else {}
    return [
        Piece(path, like, {ours: file.take(f"{path}.{theirs}") for ours, theirs in VERA.items()}, shared=shared)
        for path, _ in targets(file, model, (".vera_lambda_",))
    ]


def write_vera(root: nn.Module, installs: Sequence[Held], folder: Folder) -> None:
    """VeRA. The shared matrices have no module in their names."""
    config: Any = installs[0].config
    _whole_modules(installs, "VeRA")
    folder.config |= {
        "peft_type": "VERA", "r": config.rank, "vera_dropout": config.dropout, "d_initial": config.d_initial, "bias": "none",
        "projection_prng_key": config.seed, "save_projection": config.save_projection, "init_weights": True,
        "fan_in_fan_out": _transposed(root, installs), **shortest_names(root, [held.path for held in installs]),
    }  # fmt: skip
    for held in installs:
        own = dict(held.module.named_parameters())
        folder.tensors |= {f"{held.path}.{theirs}": own[ours] for ours, theirs in VERA.items()}
    if config.save_projection:
        (shared,) = installs[0].module._shared
        folder.beside |= {f"base_model.vera_{name}": getattr(shared, name) for name in "AB"}


def read_loha(file: Checkpoint, model: nn.Module) -> list[Piece]:
    """LoHa at linear layers."""
    names = ("w1_a", "w1_b", "w2_a", "w2_b")
    return [
        Piece(path, LoHa(**_fields(file, path)), {name: file.take(f"{path}.hada_{name}") for name in names})
        for path, _ in targets(file, model, (".hada_",))
    ]


def read_lokr(file: Checkpoint, model: nn.Module) -> list[Piece]:
    """LoKr at linear layers; which of its factors are low-rank products is seen in the file."""
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


def _fields(file: Checkpoint, path: str) -> dict[str, Any]:
    config = file.config
    for field in ("rank_dropout", "module_dropout"):
        if config.get(field):
            raise GraftError(
                f"{file.folder}: {field} has no equal in Graft; it changes training alone: set it to 0 in the config to load"
            )
    return {
        "rank": by_pattern(path, config.get("rank_pattern"), file.field("r")),
        "alpha": float(by_pattern(path, config.get("alpha_pattern"), file.field("alpha"))),
    }


def write_loha(root: nn.Module, installs: Sequence[Held], folder: Folder) -> None:
    """LoHa."""
    _write_products(root, installs, folder, "LOHA", "hada_")


def write_lokr(root: nn.Module, installs: Sequence[Held], folder: Folder) -> None:
    """LoKr."""
    config: Any = installs[0].config
    _write_products(root, installs, folder, "LOKR", "lokr_")
    folder.config |= {"decompose_both": config.decompose_both, "decompose_factor": config.factor or -1}


def _write_products(root: nn.Module, installs: Sequence[Held], folder: Folder, kind: str, mark: str) -> None:
    _whole_modules(installs, kind)
    if _transposed(root, installs):
        raise GraftError(f"PEFT has no {kind} for transposed layers (GPT-2's Conv1D)")
    ranks, alphas = ({held.path: getattr(held.config, name) for held in installs} for name in ("rank", "alpha"))
    rank, rank_pattern = patterns(ranks)
    alpha, alpha_pattern = patterns(alphas)
    if any(held.config.dropout for held in installs):
        folder.notes.append(f"dropout is not written: PEFT's {kind} has none on its input")
    folder.config |= {"peft_type": kind, "r": rank, "alpha": alpha, "rank_pattern": rank_pattern, "alpha_pattern": alpha_pattern,
                      "init_weights": True, **shortest_names(root, [held.path for held in installs])}  # fmt: skip
    for held in installs:
        folder.tensors |= {f"{held.path}.{mark}{name}": tensor for name, tensor in held.module.named_parameters()}


def _whole_modules(installs: Sequence[Held], kind: str) -> None:
    paths = [held.path for held in installs]
    if any(held.installed.site.rows is not None for held in installs) or len(set(paths)) < len(paths):
        raise GraftError(
            f"PEFT's {kind} holds one adapter for a whole layer; this one acts on slices of a fused layer, or twice on one"
        )


def _transposed(root: nn.Module, installs: Sequence[Held]) -> bool:
    return any(is_transposed(root.get_submodule(held.path)) for held in installs)

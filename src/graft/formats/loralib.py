"""Read files of loralib (microsoft/LoRA): one pickle with `<module>.lora_A` [R, I] and `<module>.lora_B` [O, R], and whole heads.

h' = h + alpha / R * B A x. The file does not hold alpha, so the caller gives it (16 in the published GLUE runs).

Legend: R rank, I input, O output features.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor, nn

from graft.adapters.base import AdapterConfig
from graft.adapters.kinds.head import Head
from graft.adapters.kinds.lora import LoRA
from graft.architectures.layers import is_linear
from graft.architectures.walk import base_submodules
from graft.errors import GraftError
from graft.formats.composing import Piece, composed
from graft.formats.foreign import AdapterFile


def detect(path: str | Path) -> bool:
    """Whether the path is a file and not a folder."""
    return Path(path).is_file()


def read(path: str | Path, model: nn.Module, alpha: float | None = None) -> tuple[AdapterConfig, dict[str, Tensor]]:
    """Read a file's adapter for this base: its config, and float32 tensors under Graft's names.

    Raises `GraftError` when alpha is not given, for a damaged file, and for tensors that fit no module of the base (all are listed).
    """
    path = Path(path)
    file = AdapterFile(path.parent, {}, "", (path.name,))
    if not any(name.endswith(".lora_A") for name in file.left):
        raise GraftError(
            f"{path} is not a loralib file: none of its {len(file.left)} tensors is called <module>.lora_A"
        )
    if alpha is None:
        raise GraftError(
            f"{path}: loralib files do not hold alpha, which scales the update: pass alpha (--alpha; LoRA's GLUE runs used 16)"
        )
    pieces = []
    for name, module in base_submodules(model):
        if is_linear(module) and f"{name}.lora_A" in file.left:
            pieces.append(_lora(file, name, float(alpha)))
        elif is_linear(module) and f"{name}.weight" in file.left:
            pieces.append(_head(file, name, module))
    file.finish()
    return composed(model, pieces)


def _lora(file: AdapterFile, name: str, alpha: float) -> Piece:
    A, B = file.take(f"{name}.lora_A"), file.take(f"{name}.lora_B")
    if A.numel() and B.numel() and (A.dim() != 2 or B.dim() != 2 or A.shape[0] != B.shape[1]):
        raise GraftError(
            f"'{name}' holds lora_A {tuple(A.shape)} and lora_B {tuple(B.shape)}. This is loralib's MergedLinear, which cannot be read: "
            "the file does not say which slices of the output it adapts"
        )
    return Piece(name, LoRA(rank=max(1, len(A)), alpha=alpha), {"A": A, "B": B})


def _head(file: AdapterFile, name: str, module: Any) -> Piece:
    """Return the piece for a layer that the file holds whole."""
    own = ["weight"] + (["bias"] if module.bias is not None else [])
    return Piece(name, Head(), {key: file.take(f"{name}.{key}") for key in own})

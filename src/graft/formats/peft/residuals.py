"""PEFT's LoRAs with an initialisation that changes the base (PiSSA, OLoRA), read as updates to the unchanged base.

PEFT replaces W by W - s B0 A0 and trains A and B, starting from A0 and B0. A saved folder holds only A and B, and PEFT computes A0 and B0
from W again when it loads them. For the unchanged W the adapter is therefore s (B A - B0 A0), which is what kind `pissa` holds:

    pissa    A0 and B0 are the principal singular directions of W
    olora    A0 and B0 are the first rows of R and the first columns of Q, where W = Q R

A decomposition may choose signs freely; B0 A0 does not depend on them. But if W has two equal singular values at the cut, or linearly
dependent columns, B0 A0 is not unique, and a folder means something else on another machine. Such a folder is refused. So are other
initialisations that W does not determine: random ones (pissa_niter_K), and those made from data (CorDA, LoRA-GA) or quantisation (LoftQ).

Legend: R rank, I input, O output features.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from graft.adapters.kinds.pissa import PiSSA, split
from graft.architectures.layers import is_linear, is_transposed
from graft.errors import GraftError
from graft.formats.composing import Piece
from graft.formats.peft.file import PeftFile

SMALLEST_GAP = 1e-6
"""The smallest gap between singular values at the cut, and the smallest entry of R's diagonal, that float32 resolves; relative to the
largest singular value or entry."""
OTHERS = {
    "pissa_niter": "comes from a randomised decomposition, which differs from run to run",
    "corda": "is made from data",
    "lora_ga": "is made from gradients",
    "loftq": "is made from a quantised base",
}
"""Initialisations that the base does not determine, and why."""


def init_of(file: PeftFile) -> str | None:
    """Return the initialisation that changed the base, or None if it did not. Raises `GraftError` if it cannot be computed again."""
    start = str(file.config.get("init_lora_weights")).lower()
    for name, why in OTHERS.items():
        if start.startswith(name):
            raise GraftError(
                f"{file.folder}: this LoRA was made with init_lora_weights '{start}', which changes the base, and its A and B fit only "
                f"the changed base. That base {why}, so it cannot be computed here. In PEFT, save with "
                "path_initial_model_for_weight_conversion to get a LoRA for the unchanged base"
            )
    return start if start in STARTS else None


@torch.no_grad()
def as_pissa(file: PeftFile, piece: Piece, module: nn.Module, start: str) -> Piece:
    """Turn a LoRA for the changed base into a PiSSA for the given base. Raises `GraftError` if the base does not determine A0 and B0."""
    config: Any = piece.config
    weight = getattr(module, "weight", None)
    if not is_linear(module) or not isinstance(weight, Tensor) or not weight.is_floating_point():
        raise GraftError(
            f"{file.folder}: the initialisation of '{piece.path}' ({start}) is computed from its weight, but this {type(module).__name__} "
            "has none, or a quantised one: load the base in bfloat16 or float32"
        )
    if start == "olora" and is_transposed(module):
        raise GraftError(f"{file.folder}: PEFT has no olora at transposed layers ('{piece.path}')")
    whole = (weight.t() if is_transposed(module) else weight).detach().float()
    if config.rank > min(whole.shape):
        raise GraftError(
            f"{file.folder}: '{piece.path}' has rank {config.rank}, which is more than its weight of shape {tuple(whole.shape)} allows"
        )
    A0, B0 = STARTS[start](whole, config.rank, config.scale, f"{file.folder}: '{piece.path}'")
    tensors = {**piece.tensors, "A0": A0.cpu().contiguous(), "B0": B0.cpu().contiguous()}
    return Piece(piece.path, PiSSA(**config.model_dump(exclude={"kind", "sites"})), tensors)


def _pissa(weight: Tensor, rank: int, scale: float, where: str) -> tuple[Tensor, Tensor]:
    left, values, right = torch.linalg.svd(weight, full_matrices=False)
    if rank < len(values) and values[rank - 1] - values[rank] <= SMALLEST_GAP * values[0]:
        raise GraftError(
            f"{where} starts from the {rank} largest singular directions of its weight, but singular values {rank} and {rank + 1} are "
            "equal, so these directions are not unique"
        )
    return split(left, values, right, rank, scale)


def _olora(weight: Tensor, rank: int, scale: float, where: str) -> tuple[Tensor, Tensor]:
    Q, R = torch.linalg.qr(weight)
    sizes = R.diagonal().abs()
    if sizes[:rank].min() <= SMALLEST_GAP * sizes.max():
        raise GraftError(
            f"{where} starts from a QR decomposition of its weight, which is not unique: its first {rank} columns depend on each other"
        )
    return R[:rank], Q[:, :rank]


STARTS: dict[str, Callable[[Tensor, int, float, str], tuple[Tensor, Tensor]]] = {"pissa": _pissa, "olora": _olora}
"""The functions that compute A0 and B0 from a weight [O, I], a rank, the scale s, and the words for an error."""

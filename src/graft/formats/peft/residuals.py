"""PEFT's LoRAs whose initialisation changed the base: what their A and B mean for the base as it is.

PEFT puts W - s B0 A0 in place of W and trains A, B from A0, B0. A saved folder holds A and B alone; who loads it computes A0 and B0 of W
again. So the adapter is s (B A - B0 A0) beside W, which is what kind `pissa` holds, wherever A0 and B0 came from:

    pissa    the principal singular directions of W
    olora    the first columns of Q and rows of R, W = Q R

Their product does not depend on the signs that a decomposition is free to choose. It does where W has two equal singular values at the
cut, or columns that depend on each other: nobody could load such a folder on another machine, and it is refused. Other initialisations
are refused because W does not say them: they are random (pissa_niter_K) or made from data (CorDA, LoRA-GA) or from a quantisation (LoftQ).

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
from graft.formats.foreign import Checkpoint

SMALLEST_GAP = 1e-6
"""Of singular values at the cut, or of R's diagonal, relative to the largest: below it float32 does not tell two directions apart."""
OTHERS = {
    "pissa_niter": "comes from a randomised decomposition, another one each time",
    "corda": "is made from data",
    "lora_ga": "is made from gradients",
    "loftq": "is made from a quantised base",
}
"""Initialisations that cannot be computed from the base."""


def start_of(file: Checkpoint) -> str | None:
    """The initialisation that changed the base, None where it is as it was. Raises `GraftError` where it cannot be computed again."""
    start = str(file.config.get("init_lora_weights")).lower()
    for name, why in OTHERS.items():
        if start.startswith(name):
            raise GraftError(
                f"{file.folder}: this LoRA was made with init_lora_weights '{start}', which changes the base, and its A and B fit the "
                f"changed base alone. That base {why}, so it is not known here. In PEFT, save with "
                "path_initial_model_for_weight_conversion to get a LoRA for the base as it is"
            )
    return start if start in STARTS else None


@torch.no_grad()
def beside_residual(file: Checkpoint, piece: Piece, module: nn.Module, start: str) -> Piece:
    """A LoRA of the changed base as a PiSSA of the base at hand. Raises `GraftError` where the base does not determine its start."""
    config: Any = piece.config
    weight = getattr(module, "weight", None)
    if not is_linear(module) or not isinstance(weight, Tensor) or not weight.is_floating_point():
        raise GraftError(
            f"{file.folder}: the start of '{piece.path}' ({start}) is computed from its weight, which {type(module).__name__} holds in "
            "quantised form or not at all: load the base in bfloat16 or float32"
        )
    if start == "olora" and is_transposed(module):
        raise GraftError(f"{file.folder}: PEFT has no olora at transposed layers ('{piece.path}')")
    whole = (weight.t() if is_transposed(module) else weight).detach().float()
    if config.rank > min(whole.shape):
        raise GraftError(
            f"{file.folder}: '{piece.path}' has rank {config.rank}, and its weight is {tuple(whole.shape)}"
        )
    A0, B0 = STARTS[start](whole, config.rank, config.scale, f"{file.folder}: '{piece.path}'")
    tensors = {**piece.tensors, "A0": A0.cpu().contiguous(), "B0": B0.cpu().contiguous()}
    return Piece(piece.path, PiSSA(**config.model_dump(exclude={"kind", "sites"})), tensors)


def _pissa(weight: Tensor, rank: int, scale: float, where: str) -> tuple[Tensor, Tensor]:
    left, values, right = torch.linalg.svd(weight, full_matrices=False)
    if rank < len(values) and values[rank - 1] - values[rank] <= SMALLEST_GAP * values[0]:
        raise GraftError(
            f"{where} was started at the {rank} largest singular directions of a weight whose singular values {rank} and {rank + 1} are "
            "the same: which directions these were cannot be known"
        )
    return split(left, values, right, rank, scale)


def _olora(weight: Tensor, rank: int, scale: float, where: str) -> tuple[Tensor, Tensor]:
    Q, R = torch.linalg.qr(weight)
    sizes = R.diagonal().abs()
    if sizes[:rank].min() <= SMALLEST_GAP * sizes.max():
        raise GraftError(
            f"{where} was started at a QR decomposition whose first {rank} columns depend on each other: it is not unique"
        )
    return R[:rank], Q[:, :rank]


STARTS: dict[str, Callable[[Tensor, int, float, str], tuple[Tensor, Tensor]]] = {"pissa": _pissa, "olora": _olora}
"""What computes A0 and B0 again."""

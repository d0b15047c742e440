"""The forms in which differences of weights are kept and travel: D [O, I] of a layer under its path, factors under path/A and path/B.

Legend: I input features, O output features, R rank.
"""

from __future__ import annotations

from torch import Tensor

from graft.adapters.kinds.full import Full
from graft.adapters.kinds.lora import LoRA
from graft.federation.messages import Tensors
from graft.formats.composing import Piece
from graft.formats.weight_change import nearest_lora

A, B = "A", "B"


def layers(state: Tensors) -> list[str]:
    """Return the paths of the layers that have a difference."""
    return list(dict.fromkeys(key.removesuffix(f"/{A}").removesuffix(f"/{B}") for key in state))


def difference(state: Tensors, path: str) -> Tensor:
    """Return D [O, I] of a layer: what is there as it is, and what its factors make."""
    parts = [state[path]] if path in state else []
    if f"{path}/{A}" in state:
        parts.append(state[f"{path}/{B}"] @ state[f"{path}/{A}"])
    return sum(parts[1:], parts[0])


def approximated(whole: Tensors, rank: int) -> tuple[Tensors, dict[str, float]]:
    """Return the factors of the nearest LoRA of each difference [O, I], and the share of all that they miss."""
    found, missed, size = dict[str, Tensor](), 0.0, 0.0
    for path, each in whole.items():
        found[f"{path}/{A}"], found[f"{path}/{B}"] = nearest_lora(each, min(rank, *each.shape))
        missed += float((each - found[f"{path}/{B}"] @ found[f"{path}/{A}"]).square().sum())
        size += float(each.square().sum())
    return found, {"approximation error": (missed / size) ** 0.5 if size else 0.0}


def smaller(state: Tensors) -> tuple[Tensors, dict[str, float]]:
    """Return each layer's D in the smaller form: its factors, or as it is; and the largest rank of factors."""
    found, ranks = dict[str, Tensor](), [0]
    for path in layers(state):
        down, up = state.get(f"{path}/{A}"), state.get(f"{path}/{B}")
        if down is None or up is None or path in state or down.numel() + up.numel() >= up.shape[0] * down.shape[1]:
            found[path] = difference(state, path)
        else:
            found |= {f"{path}/{A}": down, f"{path}/{B}": up}
            ranks.append(len(down))
    return found, {"stacked rank": float(max(ranks))}


def pieces_of(state: Tensors) -> list[Piece]:
    """Return the adapter that a state is, layer by layer."""
    found = []
    for key, each in state.items():
        path, _, factor = key.rpartition("/")
        if factor == A:
            rank = each.shape[0]
            found.append(Piece(path, LoRA(rank=rank, alpha=float(rank)), {A: each, B: state[f"{path}/{B}"]}))
        elif not factor or not path:
            found.append(Piece(key, Full(), {"weight": each}))
    return found

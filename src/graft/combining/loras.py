"""The LoRA that combines several adapters: made of the factors of LoRAs, or of the differences that any adapter adds to weights.

Legend: I input features, O output features, R rank.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from graft.adapters.kinds.lora import LoRA
from graft.combining.arithmetic import combined
from graft.errors import GraftError
from graft.formats.composing import Piece
from graft.formats.folder import SiteAdapter
from graft.formats.weight_change import nearest_lora, weight_change


def is_lora(part: SiteAdapter) -> bool:
    return part.config.kind == "lora" and getattr(part.module, "bias", None) is None


def of_factors(
    parts: Mapping[str, list[SiteAdapter]], weights: Mapping[str, float], how: str, density: float, generator: Any
) -> list[Piece]:
    """Combine A and B of LoRAs at each place where any of them is. `cat` lays them side by side; others need one rank."""
    if how == "svd":
        raise GraftError(
            "svd approximates differences, so it does not combine factors: leave out on, or choose another way"
        )
    places: dict[tuple[str, str], list[tuple[float, Any]]] = {}
    for name, own in parts.items():
        for each in own:
            if not is_lora(each):
                what = "a LoRA with a trained bias" if each.config.kind == "lora" else f"kind {each.config.kind}"
                other = (
                    "svd, or on differences" if each.installed.changes_weight else "linear, which averages equal kinds"
                )
                raise GraftError(
                    f"'{name}' is {what} at {each.path}, and {how} on factors is for LoRAs: choose {other}"
                )
            places.setdefault((each.path, each.installed.site.part), []).append((weights[name], each.module))
    pieces = []
    for (path, part), found in places.items():
        if how == "cat":
            A = torch.cat([module.A for _, module in found], -2)
            B = torch.cat([weight * module.scale * module.B for weight, module in found], -1)
        else:
            if len(ranks := {module.A.shape[-2] for _, module in found}) > 1:
                raise GraftError(
                    f"the LoRAs have ranks {', '.join(map(str, sorted(ranks)))} at {path}, and {how} on factors needs one rank: choose cat "
                    "or svd, or on differences"
                )
            A, B = _factors(found, how, density, generator)
        config = LoRA(rank=A.shape[-2], alpha=float(A.shape[-2]))
        pieces.append(Piece(path, config, {"A": A, "B": B}, part))
    return pieces


def _factors(found: list[tuple[float, Any]], how: Any, density: float, generator: Any) -> tuple[Tensor, Tensor]:
    """Combine A and B, each with the root of weight times scale; the sign of a negative weight goes to A."""
    strengths = [weight * module.scale for weight, module in found]
    roots = [math.sqrt(abs(strength)) for strength in strengths]
    signed = [math.copysign(root, strength) for root, strength in zip(roots, strengths, strict=True)]
    A = combined(how, [module.A for _, module in found], signed, density, generator)
    B = combined(how, [module.B for _, module in found], roots, density, generator)
    return A, B


def of_differences(
    root: nn.Module,
    parts: Mapping[str, list[SiteAdapter]],
    weights: Mapping[str, float],
    how: Any,
    rank: int | None,
    density: float,
    generator: Any,
) -> list[Piece]:
    """Combine the differences D [O, I] at each layer, and approximate the result by a LoRA."""
    if how == "cat":
        raise GraftError("cat lays factors side by side, so it does not combine differences: choose svd")
    for name, own in parts.items():
        if stuck := next((each for each in own if not each.installed.changes_weight), None):
            raise GraftError(
                f"'{name}' is of kind {stuck.config.kind} at {stuck.path}, which is no difference of weights of a linear layer, so {how} "
                "does not apply. linear averages adapters with equal settings"
            )
    ranks = [each.config.rank for own in parts.values() for each in own if hasattr(each.config, "rank")]
    if rank is None and not ranks:
        raise GraftError("these adapters have no rank of their own: say which rank the LoRA that approximates them has")
    pieces = []
    for path in dict.fromkeys(each.path for own in parts.values() for each in own):
        found = _differences(root, path, parts)
        arithmetic = "linear" if how == "svd" else how
        own_weights = [weights[name] for name in found]
        whole = combined(arithmetic, list(found.values()), own_weights, density, generator)
        kept = min(rank or max(ranks), *whole.shape)
        A, B = nearest_lora(whole, kept)
        pieces.append(Piece(path, LoRA(rank=kept, alpha=float(kept)), {"A": A, "B": B}))
    return pieces


def _differences(root: nn.Module, path: str, parts: Mapping[str, list[SiteAdapter]]) -> dict[str, Tensor]:
    """Return what each adapter at a layer adds to its weight [O, I], in float32."""
    there = {name: [each for each in own if each.path == path] for name, own in parts.items()}
    return {name: weight_change(root.get_submodule(path), path, own) for name, own in there.items() if own}


def distance(
    root: nn.Module, pieces: Sequence[Piece], parts: Mapping[str, list[SiteAdapter]], weights: Mapping[str, float]
) -> tuple[float | None, float | None]:
    """Return the relative distance of a LoRA from the weighted sum of differences, over all layers and at the worst one."""
    every = [each for own in parts.values() for each in own]
    if not all(each.installed.changes_weight for each in every):
        return None, None
    by_path: dict[str, list[Piece]] = {}
    for piece in pieces:
        by_path.setdefault(piece.path, []).append(piece)
    missed = total = worst = 0.0
    sliced = {(each.path, each.installed.site.part): each.features for each in every}
    for path, own in by_path.items():
        found = _differences(root, path, parts)
        wanted = sum(weights[name] * delta for name, delta in found.items())
        assert isinstance(wanted, Tensor)
        left = wanted.double()  # the square of a large weight is no float32
        size = float(left.square().sum())
        for piece in own:
            left[sliced.get((path, piece.part), slice(None))] -= (piece.tensors["B"] @ piece.tensors["A"]).double()
        lost = float(left.square().sum())
        missed, total, worst = missed + lost, total + size, max(worst, (lost / size) ** 0.5 if size else 0.0)
    return (missed / total) ** 0.5 if total else 0.0, worst

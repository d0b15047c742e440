"""LoRA on single experts, as PEFT stored it while transformers kept each expert's layers as modules (PEFT up to 0.17).

    <block>.experts.<e>.w1.lora_A.weight [R, I]      lora_B.weight [O, R]

transformers now stacks the weights of all experts, with the layers that read the same input side by side (gate and up). The update of a
stack is therefore one LoRA for each expert: A holds those of its layers one below the other, and B each layer's own at the output features
of that layer, with zeros elsewhere. Experts and layers that the folder does not adapt are zeros too. E.g. gate and up of rank 2:

    A [4, I] = [A_gate; A_up]        B [O, 4] = [[B_gate, 0], [0, B_up]]

Legend: E experts, R rank, I input, O output features of a stack, e the number of an expert.
"""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import Tensor, nn

from graft.adapters.kinds.lora import LoRA
from graft.architectures.experts import PARTS, expert_parts
from graft.architectures.site import Site
from graft.architectures.walk import base_submodules
from graft.errors import GraftError
from graft.formats.composing import Piece
from graft.formats.peft.experts import expert_site
from graft.formats.peft.file import PeftFile
from graft.formats.peft.targets import by_pattern, is_target
from graft.injection.state import site_table_of

MARK = ".lora_A.weight"


def old_expert_pieces(file: PeftFile, model: nn.Module, settings: dict[str, Any]) -> list[Piece]:
    """Read the LoRAs of single experts. settings: the fields that they share with LoRAs at modules. Raises `GraftError` for DoRA there."""
    names = [name.removesuffix(MARK) for name in file.left if name.endswith(MARK)]
    seen = [name for name in names if file.old.stacked(name) is not None]
    if not seen:
        return []
    if file.config["use_dora"] or file.config["lora_bias"]:
        raise GraftError(f"{file.folder}: DoRA and lora_bias on single experts ('{seen[0]}') have no equal in Graft")
    layers = _layers(file, model, seen)
    file.elsewhere = list(layers)
    chosen = set(seen) if _told_by_names(file) else {path for path in layers if is_target(path, file.config)}
    stacks: dict[str, list[str]] = {}
    for path, parameter in layers.items():
        if path in chosen:
            stacks.setdefault(parameter, []).append(path)
    return [_piece(file, model, parameter, paths, settings) for parameter, paths in stacks.items()]


def _told_by_names(file: PeftFile) -> bool:
    """Whether the names of the tensors tell which layers are adapted: without a list of targets, and where the rule for layers differed."""
    return not isinstance(file.config["target_modules"], list) or file.config["layers_to_transform"] is not None


def _layers(file: PeftFile, model: nn.Module, seen: list[str]) -> dict[str, str]:
    """Return every layer of every expert by the path that it had, with the stacked parameter that holds it now.

    seen: some of these paths. The experts of other blocks were called the same but for the numbers of their blocks.
    """
    stacks = {path: module for path, module in base_submodules(model) if expert_parts(module)}
    found: dict[str, str] = {}
    for path in seen:
        stacked = file.old.stacked(path)
        assert stacked is not None
        own = stacked[0].rpartition(".")[0]
        before = re.fullmatch(r"(.+)\.\d+\.[^.]+", path)
        if before is None or own not in stacks or f"{path.rpartition('.')[0]}." in "".join(found):
            continue
        for other, module in stacks.items():
            prefix = _renumbered(before[1], own, other)
            for expert in range(module.get_parameter(PARTS[expert_parts(module)[0]]).shape[0]) if prefix else ():
                for name in file.old.siblings(path):
                    layer = f"{prefix}.{expert}.{name}"
                    if (place := file.old.stacked(layer)) is not None:
                        found[layer] = place[0]
    return found


def _renumbered(prefix: str, own: str, other: str) -> str | None:
    """Return an old path with the numbers of another block, None if the two blocks differ in more than numbers."""
    if re.sub(r"\d+", "#", own) != re.sub(r"\d+", "#", other):
        return None
    numbers = iter(re.findall(r"\d+", other))
    return re.sub(r"\d+", lambda match: next(numbers, match[0]), prefix)


def _piece(file: PeftFile, model: nn.Module, parameter: str, paths: list[str], settings: dict[str, Any]) -> Piece:
    """Return the piece of one stacked parameter. paths: the old paths of its adapted layers."""
    module, _, name = parameter.rpartition(".")
    part = next((part for part, own in PARTS.items() if own == name), "")
    site = expert_site(site_table_of(model), module, part)
    if site is None:
        raise GraftError(f"{file.folder}: Graft has no site at '{parameter}', which holds the weights of '{paths[0]}'")
    pairs = {path: tuple(file.take(f"{path}.lora_{side}.weight") for side in "AB") for path in paths}
    fields = {path: _fields(file, path, settings) for path in paths}
    like = fields[paths[0]]
    if any(not tensor.numel() for pair in pairs.values() for tensor in pair):  # they are missing; `finish` reports it
        return Piece(module, like, {"A": torch.empty(0), "B": torch.empty(0)}, part)
    own: dict[int, list[str]] = {}
    for path in paths:
        own.setdefault(_place(file, path)[1], []).append(path)
    rank = max(sum(fields[path].rank for path in each) for each in own.values())
    A, B = torch.zeros(site.num_experts, rank, site.in_features), torch.zeros(site.num_experts, site.out_features, rank)
    for expert, each in own.items():
        column = 0
        for path in each:
            _fill(
                file,
                site,
                path,
                pairs[path],
                (A[expert, column:], B[expert, :, column:]),
                fields[path].scale / like.scale,
            )
            column += fields[path].rank
    whole = LoRA(rank=rank, alpha=like.scale * (rank**0.5 if like.rslora else rank), **settings)
    return Piece(module, whole, {"A": A, "B": B}, part)


def _place(file: PeftFile, path: str) -> tuple[str, int, int, int]:
    stacked = file.old.stacked(path)
    assert stacked is not None
    return stacked


def _fields(file: PeftFile, path: str, settings: dict[str, Any]) -> LoRA:
    config = file.config
    return LoRA(
        rank=by_pattern(path, config["rank_pattern"], file.field("r")),
        alpha=float(by_pattern(path, config["alpha_pattern"], file.field("lora_alpha"))),
        **settings,
    )


def _fill(
    file: PeftFile, site: Site, path: str, pair: tuple[Tensor, ...], into: tuple[Tensor, Tensor], factor: float
) -> None:
    """Put one layer's A and B, times a factor, where they belong in those of its expert."""
    _, _, number, count = _place(file, path)
    A, B = pair
    size, rank = site.out_features // count, len(A)
    if tuple(A.shape) != (rank, site.in_features) or tuple(B.shape) != (size, rank) or rank > len(into[0]):
        raise GraftError(
            f"{file.folder}: lora_A {tuple(A.shape)} and lora_B {tuple(B.shape)} of '{path}' do not fit a layer of {site.in_features} "
            f"input and {size} output features with the rank of the config"
        )
    into[0][:rank] = A
    into[1][number * size : (number + 1) * size, :rank] = B * factor

"""LoRA on parameters that PEFT names in `target_parameters`: the weights of experts, and the weights of linear layers.

For the experts' weight [E, s1, s2] PEFT stores one pair of matrices. Expert e has its A_e at indices e R to (e + 1) R of lora_A's first
dimension, and its B_e in columns e, E + e, 2 E + e, ... of lora_B. There are two conventions for the sides:

    lora_A [E R, s2], lora_B [s1, R E]      update of expert e: s B_e A_e        from PEFT 0.19 on, if the module has no is_transposed
    lora_A [E R, s1], lora_B [s2, R E]      update of expert e: s A_e^T B_e^T    if it has, and always up to PEFT 0.18

E.g. for 4 experts, rank 2 and a weight [4, 16, 8], the first convention has lora_A [8, 8] and lora_B [16, 8]. Expert 1 has A_1 at indices
2 and 3 of lora_A, and the two columns of B_1 are columns 1 and 5 of lora_B.

PEFT wraps a module once per parameter, in the order of the module's parameters, so the first is wrapped innermost. With two of them,
`experts.base_layer.lora_A.weight` belongs to the first and `experts.lora_A.weight` to the second. `layers_to_transform` and
`exclude_modules` do not apply to parameters.

Legend: E experts, R rank, I input, O output features.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from graft.adapters.kinds.lora import LoRA
from graft.architectures.experts import PARTS, expert_parts
from graft.architectures.layers import is_linear, is_transposed
from graft.architectures.site import Site
from graft.architectures.sites import SiteTable
from graft.architectures.walk import base_submodules
from graft.errors import GraftError, did_you_mean
from graft.formats.composing import Piece
from graft.formats.folder import Folder, SiteAdapter
from graft.formats.peft.file import PeftFile
from graft.formats.peft.targets import by_pattern
from graft.injection.state import site_table_of


def parameter_pieces(file: PeftFile, model: nn.Module, settings: dict[str, Any]) -> list[Piece]:
    """Read the LoRAs of `target_parameters`. settings: the fields that they share with LoRAs at modules.

    Raises `GraftError` for names that match nothing, and for parameters that are weights of neither experts nor linear layers.
    """
    wanted = sorted(file.config.get("target_parameters") or ())
    every = [name for path, module in base_submodules(model) for name in _names(path, module)]
    for name in wanted:
        if not any(matches(key, name) for key in every):
            near = did_you_mean(name.rpartition(".")[2], {key.rpartition(".")[2] for key in every})
            raise GraftError(f"{file.folder}: target parameter '{name}' is not in this base.{near}")
    site_table, pieces = site_table_of(model), []
    for path, module in base_submodules(model) if wanted else ():
        own = [key for key in _names(path, module) if any(matches(key, name) for name in wanted)]
        for number, key in enumerate(own):
            prefix = path + ".base_layer" * (len(own) - 1 - number)
            pieces.append(_piece(file, site_table, module, key, prefix, settings))
    return pieces


def _names(path: str, module: nn.Module) -> list[str]:
    return [f"{path}.{name}" for name, _ in module.named_parameters(recurse=False)]


def matches(key: str, name: str) -> bool:
    """Whether a name in `target_parameters` matches a parameter. key: the parameter's whole name."""
    return key == name or key.endswith(f".{name}")


def _piece(
    file: PeftFile, site_table: SiteTable, module: nn.Module, key: str, prefix: str, settings: dict[str, Any]
) -> Piece:
    path, _, parameter = key.rpartition(".")
    A, B = (file.take(f"{prefix}.lora_{side}.weight") for side in "AB")
    config = LoRA(
        **settings,
        rank=by_pattern(key, file.config.get("rank_pattern"), file.field("r")),
        alpha=float(by_pattern(key, file.config.get("alpha_pattern"), file.field("lora_alpha"))),
    )
    if is_linear(module) and not is_transposed(module) and parameter == "weight":
        return Piece(path, config, {"A": A, "B": B})
    part = next((part for part in expert_parts(module) if PARTS[part] == parameter), None)
    site = None if part is None else expert_site(site_table, path, part)
    if part is None or site is None:
        raise GraftError(
            f"{file.folder}: target parameter '{key}' is not a weight of a linear layer or of experts, so Graft has no site there"
        )
    if not (A.numel() and B.numel()):  # they are missing; `finish` reports it
        return Piece(path, config, {"A": A, "B": B}, part)
    return Piece(path, config, _experts_tensors(file, module, key, site, A, B), part)


def expert_site(site_table: SiteTable, path: str, part: str) -> Site | None:
    """Return the site of one weight of a module of experts, None if the model has no such site."""
    every = [site for sites in site_table.by_name.values() for site in sites if site.type == "experts"]
    return next((site for site in every if (site.module, site.part) == (path, part)), None)


def _experts_tensors(
    file: PeftFile, module: nn.Module, key: str, site: Site, A: Tensor, B: Tensor
) -> dict[str, Tensor]:
    """Turn PEFT's pair into A [E, R, I] and B [E, O, R]."""
    experts, first, second = module.get_parameter(key.rpartition(".")[2]).shape
    shape = (B.shape[0], A.shape[-1])
    fits = {reads_first: shape == sizes for reads_first, sizes in ((False, (first, second)), (True, (second, first)))}
    # `reads_first` means that lora_A reads the weight's first size, s1. The shapes tell, unless the weight is square.
    if not any(fits.values()) or A.shape[0] % experts or B.shape[-1] != A.shape[0]:
        raise GraftError(
            f"{file.folder}: lora_A {tuple(A.shape)} and lora_B {tuple(B.shape)} of '{key}' do not fit "
            f"{experts} experts of {first} x {second}"
        )
    reads_first = _reads_first(file, module) if all(fits.values()) else fits[True]
    # Undo the interleaving: [s1, R E] -> [s1, R, E] -> [E, s1, R].
    A_E, B_E = A.view(experts, -1, A.shape[-1]), B.view(B.shape[0], -1, experts).permute(2, 0, 1)
    if reads_first != _stored_in_first(module, site):
        A_E, B_E = B_E.transpose(1, 2), A_E.transpose(1, 2)
    return {"A": A_E.contiguous(), "B": B_E.contiguous()}


def _reads_first(file: PeftFile, module: nn.Module) -> bool:
    """Whether lora_A reads the first size of a square weight, judged by the PEFT version that wrote the file and by the module."""
    version = re.match(r"(\d+)\.(\d+)", str(file.config.get("peft_version") or "0.0"))  # PEFT up to 0.17 writes none
    old = version is not None and (int(version[1]), int(version[2])) < (0, 19)
    return old or _says_transposed(module)


def _says_transposed(module: nn.Module) -> bool:
    return bool(getattr(module, "is_transposed", False))


def _stored_in_first(module: nn.Module, site: Site) -> bool:
    """Whether a weight is stored as [E, I, O]. Its two sizes decide; the module's word counts only for a square weight."""
    first, second = module.get_parameter(PARTS[site.part]).shape[1:]
    return _says_transposed(module) if first == second else (first, second) == (site.in_features, site.out_features)


@torch.no_grad()
def write_parameters(root: nn.Module, adapters: Sequence[SiteAdapter], folder: Folder) -> None:
    """Write the names and tensors of LoRAs on experts, in the convention of PEFT 0.19 and later."""
    by_site = {(adapter.path, adapter.installed.site.part): adapter for adapter in adapters}
    if len(by_site) < len(adapters):
        raise GraftError("PEFT holds one LoRA for each weight of experts; this adapter is a stack with several at one")
    wanted = {f"{path}.{PARTS[part]}" for path, part in by_site}
    folder.config["target_parameters"] = _shortest(root, wanted)
    for path in dict.fromkeys(path for path, _ in by_site):
        module = root.get_submodule(path)
        own = [key for key in _names(path, module) if key in wanted]
        for number, key in enumerate(own):
            part = next(part for part, name in PARTS.items() if key == f"{path}.{name}")
            adapter = by_site[path, part]
            A, B = adapter.module.A, adapter.module.B
            if _says_transposed(module) != _stored_in_first(module, adapter.installed.site):
                A, B = B.transpose(1, 2), A.transpose(1, 2)
            prefix = path + ".base_layer" * (len(own) - 1 - number)
            folder.tensors[f"{prefix}.lora_A.weight"] = A.flatten(0, 1)
            folder.tensors[f"{prefix}.lora_B.weight"] = B.permute(1, 2, 0).flatten(1)


def _shortest(root: nn.Module, wanted: set[str]) -> list[str]:
    """Return names of two parts (`experts.gate_up_proj`) if they match exactly the wanted parameters, else whole names."""
    ends = sorted({".".join(key.split(".")[-2:]) for key in wanted})
    matched = {
        key
        for path, module in base_submodules(root)
        for key in _names(path, module)
        if any(matches(key, end) for end in ends)
    }
    return ends if matched == wanted else sorted(wanted)

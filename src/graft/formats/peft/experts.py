"""LoRA on weights that PEFT names by `target_parameters`: experts of three dimensions, and the weights of linear layers.

With s1, s2 the last two sizes of a weight [E, s1, s2], PEFT stores one pair for all experts, expert e in rows e R to (e + 1) R of lora_A
and in columns e, E + e, 2 E + e, ... of lora_B, in one of two ways:

    lora_A [E R, s2], lora_B [s1, R E]      D_e = s B_e A_e        from PEFT 0.19 on, where the module does not say is_transposed
    lora_A [E R, s1], lora_B [s2, R E]      D_e = s A_e^T B_e^T    where it does, and everywhere up to PEFT 0.18

PEFT wraps a module once for each parameter, in the order in which the module has them, so a pair's name says how many wraps lie outside of
its own: `experts.base_layer.lora_A.weight` is the first of two, `experts.lora_A.weight` the last. `layers_to_transform` and
`exclude_modules` do not hold for parameters.

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
from graft.errors import GraftError, did_you_mean
from graft.formats.composing import Piece
from graft.formats.foreign import Checkpoint
from graft.formats.peft.folder import Folder, Held
from graft.formats.peft.targets import by_pattern
from graft.injection.state import site_table_of


def parameter_pieces(file: Checkpoint, model: nn.Module, settings: dict[str, Any]) -> list[Piece]:
    """The LoRAs of `target_parameters`. settings: what they share with LoRAs at modules.

    Raises `GraftError` for names that match nothing, and for parameters that are neither experts' weights nor those of linear layers.
    """
    wanted = sorted(file.config.get("target_parameters") or ())
    every = [name for path, module in own_modules(model) for name in _names(path, module)]
    for name in wanted:
        if not any(matches(key, name) for key in every):
            near = did_you_mean(name.rpartition(".")[2], {key.rpartition(".")[2] for key in every})
            raise GraftError(f"{file.folder}: target parameter '{name}' is not in this base.{near}")
    site_table, pieces = site_table_of(model), []
    for path, module in own_modules(model) if wanted else ():
        own = [key for key in _names(path, module) if any(matches(key, name) for name in wanted)]
        for number, key in enumerate(own):
            prefix = path + ".base_layer" * (len(own) - 1 - number)
            pieces.append(_piece(file, site_table, module, key, prefix, settings))
    return pieces


def own_modules(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """The base's modules by path, adapters left out."""
    return [(path, module) for path, module in model.named_modules() if path and "graft" not in path.split(".")]


def _names(path: str, module: nn.Module) -> list[str]:
    return [f"{path}.{name}" for name, _ in module.named_parameters(recurse=False)]


def matches(key: str, name: str) -> bool:
    """Whether PEFT takes a name of the list for a parameter."""
    return key == name or key.endswith(f".{name}")


def _piece(
    file: Checkpoint, site_table: SiteTable, module: nn.Module, key: str, prefix: str, settings: dict[str, Any]
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
            f"{file.folder}: target parameter '{key}' is neither the weight of a linear layer nor that of experts: Graft has no site there"
        )
    if not (A.numel() and B.numel()):  # missing, which `finish` reports
        return Piece(path, config, {"A": A, "B": B}, part)
    return Piece(path, config, _experts_tensors(file, module, key, site, A, B), part)


def expert_site(site_table: SiteTable, path: str, part: str) -> Site | None:
    """The site of one part of a module of experts."""
    every = [site for sites in site_table.by_name.values() for site in sites if site.type == "experts"]
    return next((site for site in every if (site.module, site.part) == (path, part)), None)


def _experts_tensors(
    file: Checkpoint, module: nn.Module, key: str, site: Site, A: Tensor, B: Tensor
) -> dict[str, Tensor]:
    """A [E, R, I] and B [E, O, R] from PEFT's pair."""
    experts, first, second = module.get_parameter(key.rpartition(".")[2]).shape
    shape = (B.shape[0], A.shape[-1])
    fits = {reads_first: shape == sizes for reads_first, sizes in ((False, (first, second)), (True, (second, first)))}
    if not any(fits.values()) or A.shape[0] % experts or B.shape[-1] != A.shape[0]:
        raise GraftError(
            f"{file.folder}: lora_A {tuple(A.shape)} and lora_B {tuple(B.shape)} of '{key}' do not fit "
            f"{experts} experts of {first} x {second}"
        )
    reads_first = _reads_first(file, module) if all(fits.values()) else fits[True]
    A_E, B_E = A.view(experts, -1, A.shape[-1]), B.view(B.shape[0], -1, experts).permute(2, 0, 1)
    if reads_first != _stored_in_first(module, site):
        A_E, B_E = B_E.transpose(1, 2), A_E.transpose(1, 2)
    return {"A": A_E.contiguous(), "B": B_E.contiguous()}


def _reads_first(file: Checkpoint, module: nn.Module) -> bool:
    """Of weights whose two sizes are the same, where shapes do not tell: by the version that wrote the file."""
    version = re.match(r"(\d+)\.(\d+)", str(file.config.get("peft_version") or "0.0"))  # up to 0.17 none is written
    old = version is not None and (int(version[1]), int(version[2])) < (0, 19)
    return old or _says_transposed(module)


def _says_transposed(module: nn.Module) -> bool:
    return bool(getattr(module, "is_transposed", False))


def _stored_in_first(module: nn.Module, site: Site) -> bool:
    """Whether a weight is stored [E, I, O], whatever its module says."""
    first, second = module.get_parameter(PARTS[site.part]).shape[1:]
    return _says_transposed(module) if first == second else (first, second) == (site.in_features, site.out_features)


@torch.no_grad()
def write_parameters(root: nn.Module, installs: Sequence[Held], folder: Folder) -> None:
    """Names and tensors of LoRAs on experts, in the layout of PEFT from 0.19 on."""
    held_at = {(held.path, held.installed.site.part): held for held in installs}
    if len(held_at) < len(installs):
        raise GraftError("PEFT holds one LoRA for a weight of experts; this adapter is a stack with several there")
    wanted = {f"{path}.{PARTS[part]}" for path, part in held_at}
    folder.config["target_parameters"] = _shortest(root, wanted)
    for path in dict.fromkeys(path for path, _ in held_at):
        module = root.get_submodule(path)
        own = [key for key in _names(path, module) if key in wanted]
        for number, key in enumerate(own):
            part = next(part for part, name in PARTS.items() if key == f"{path}.{name}")
            held = held_at[path, part]
            A, B = held.module.A, held.module.B
            if _says_transposed(module) != _stored_in_first(module, held.installed.site):
                A, B = B.transpose(1, 2), A.transpose(1, 2)
            prefix = path + ".base_layer" * (len(own) - 1 - number)
            folder.tensors[f"{prefix}.lora_A.weight"] = A.flatten(0, 1)
            folder.tensors[f"{prefix}.lora_B.weight"] = B.permute(1, 2, 0).flatten(1)


def _shortest(root: nn.Module, wanted: set[str]) -> list[str]:
    """Names of the last module and the parameter where they say exactly these, else whole ones."""
    ends = sorted({".".join(key.split(".")[-2:]) for key in wanted})
    said = {
        key
        for path, module in own_modules(root)
        for key in _names(path, module)
        if any(matches(key, end) for end in ends)
    }
    return ends if said == wanted else sorted(wanted)

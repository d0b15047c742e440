"""From the adapters of single modules to one config: what readers of other formats find module by module becomes sites and a stack."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from torch import Tensor, nn

from graft.adapters.base import AdapterConfig
from graft.adapters.kinds.stack import Stack
from graft.architectures.blocks import stack_of
from graft.architectures.experts import PARTS
from graft.architectures.site import Site
from graft.architectures.sites import SiteTable
from graft.injection.state import SHARED, site_table_of

PATTERNED = {"rank": "rank_pattern", "alpha": "alpha_pattern"}
"""Fields of low-rank kinds that may differ between its sites, and the fields that say so."""


@dataclass(frozen=True)
class Piece:
    """What a file says of one module: its adapter's config without sites, and its tensors by the adapter's own names."""

    path: str
    config: AdapterConfig
    tensors: dict[str, Tensor]
    part: str = "linear"
    """The part of Graft's tensor names behind the module: a site's type, or attn and mlp for sublayers."""
    shared: dict[str, Tensor] = field(default_factory=dict)
    """What all sites of the config share, the same for all of its pieces."""

    @property
    def place(self) -> str:
        """What patterns of ranks match: the module's path, with the part behind it for the weights of experts."""
        return f"{self.path}.{self.part}" if self.part in PARTS else self.path


@dataclass
class Group:
    """Pieces that one config covers."""

    config: AdapterConfig
    pieces: list[Piece] = field(default_factory=list)


def composed(model: nn.Module, pieces: Sequence[Piece]) -> tuple[AdapterConfig, dict[str, Tensor]]:
    """One config for all pieces, a stack where they differ in more than their place, and the tensors under Graft's names."""
    site_table = site_table_of(model)
    groups = _grouped(pieces)
    configs = []
    for group in groups:
        names: list[str] = []
        for part in dict.fromkeys(piece.part for piece in group.pieces):
            names += site_names(site_table, [piece.path for piece in group.pieces if piece.part == part], part)
        sites = tuple(names) if any(name.startswith("re:") for name in names) else " ".join(names)
        configs.append(group.config.model_copy(update={"sites": sites}))
    taken: dict[tuple[str, str], int] = {}
    tensors: dict[str, Tensor] = {}
    for piece in (piece for group in groups for piece in group.pieces):
        count = taken[piece.path, piece.part] = taken.get((piece.path, piece.part), -1) + 1
        key = f"{piece.part}_{count}" if count else piece.part
        tensors |= {f"{piece.path}.{key}.{name}": tensor for name, tensor in piece.tensors.items()}
    for number, group in enumerate(groups):
        tensors |= {f"{SHARED}{number}.{name}": tensor for name, tensor in group.pieces[0].shared.items()}
    return configs[0] if len(configs) == 1 else Stack(adapters=tuple(configs)), tensors


def _grouped(pieces: Sequence[Piece]) -> list[Group]:
    """Pieces of equal configs together. LoRA's differences in rank and alpha are patterns of one config."""
    groups: dict[str, Group] = {}
    for piece in pieces:
        plain = piece.config
        if patterned(plain):
            plain = plain.model_copy(update=dict.fromkeys(PATTERNED, 1))
        key = f"{plain.kind} {plain.model_dump_json()}"
        groups.setdefault(key, Group(piece.config)).pieces.append(piece)
    for group in groups.values():
        if patterned(group.config):
            group.config = _with_patterns(group.config, group.pieces)
    return list(groups.values())


def patterned(config: AdapterConfig) -> bool:
    """Whether a kind's rank and alpha may differ between its sites."""
    return all(pattern in type(config).model_fields for pattern in PATTERNED.values())


def _with_patterns(config: AdapterConfig, pieces: Sequence[Piece]) -> AdapterConfig:
    """The most frequent values as the fields, the others as patterns of exact module names."""
    changes: dict[str, object] = {}
    for name, pattern in PATTERNED.items():
        values = [getattr(piece.config, name) for piece in pieces]
        usual = max(dict.fromkeys(values), key=values.count)
        changes[name] = usual
        changes[pattern] = {
            re.escape(piece.place): value for piece, value in zip(pieces, values, strict=True) if value != usual
        }
    return config.model_copy(update=changes)


def difference(whole: Tensor, base: Tensor) -> Tensor:
    """A whole tensor of a file minus the base's own, in float32; one of another shape stays, for the strict copy to report."""
    return whole - base.detach().float().cpu() if whole.shape == base.shape else whole


def site_names(site_table: SiteTable, paths: Iterable[str], part: str = "linear") -> list[str]:
    """The shortest way to say these modules in the site language; a regular expression for each that has no name."""
    left, names = set(paths), []
    for name, sites in (site_table.attentions if part == "prefix" else site_table.by_name).items():
        if name.rpartition(".")[2] in ("linear", "bias"):  # these say more than one kind of module
            continue
        for stack, own in _by_stack([site for site in sites if site.part == part]).items():
            layers = {site.layer for site in own if site.module in left}
            chosen = [site for site in own if site.layer in layers]
            if not chosen or any(site.module not in left for site in chosen) or (name == "norm" and chosen != own):
                continue
            span = "" if chosen == own else "@" + ",".join(str(layer) for layer in sorted(layers, key=lambda n: n or 0))
            said = stack and len(site_table.stacks) > 1 and not name.startswith(f"{stack}.")
            names.append(f"{stack}.{name}{span}" if said else f"{name}{span}")
            left -= {site.module for site in chosen}
    return names + [f"re:{re.escape(path)}" for path in sorted(left)]


def _by_stack(sites: Sequence[Site]) -> dict[str, list[Site]]:
    found: dict[str, list[Site]] = {}
    for site in sites:
        found.setdefault(stack_of(site.module), []).append(site)
    return found

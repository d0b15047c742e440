"""Turn what a file holds, one adapter per module, into one config with sites.

Other formats list modules; Graft's configs name sites. A file with a LoRA of rank 8 at every `q_proj` and `v_proj` gives as many pieces,
and they become `LoRA(rank=8, sites="attn.q attn.v")`. Pieces with different configs become a stack.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from torch import Tensor, nn

from graft.adapters.base import AdapterConfig
from graft.adapters.kinds.stack import Stack
from graft.adapters.nesting import placed
from graft.architectures.blocks import stack_of
from graft.architectures.experts import PARTS
from graft.architectures.site import Site, SiteKeys
from graft.architectures.sites import SiteTable
from graft.injection.state import SHARED, site_table_of

PATTERNED = {"rank": "rank_pattern", "alpha": "alpha_pattern"}
"""Fields of a low-rank kind that may differ between its sites, and the fields that hold the exceptions."""


@dataclass(frozen=True)
class Piece:
    """The adapter that a file holds for one module."""

    path: str
    """The module's path."""
    config: AdapterConfig
    """Its config, without sites."""
    tensors: dict[str, Tensor]
    """Its tensors by the names that the adapter's kind gives them."""
    part: str = "linear"
    """What follows the module's path in Graft's tensor names: the site's type, or attn and mlp for sublayers."""
    shared: dict[str, Tensor] = field(default_factory=dict)
    """The tensors that all sites of the config share; equal for all of its pieces."""
    apart: str = ""
    """Pieces with another text here get another config, even if theirs is equal."""

    @property
    def place(self) -> str:
        """The text that rank and alpha patterns match: the module's path, and for the weights of experts the part after it."""
        return f"{self.path}.{self.part}" if self.part in PARTS else self.path


@dataclass
class Group:
    """The pieces that one config covers."""

    config: AdapterConfig
    pieces: list[Piece] = field(default_factory=list)


def composed(model: nn.Module, pieces: Sequence[Piece]) -> tuple[AdapterConfig, dict[str, Tensor]]:
    """Return one config for all pieces, a stack if their settings differ, and the tensors under Graft's names."""
    site_table = site_table_of(model)
    groups = _grouped(pieces)
    configs = []
    for group in groups:
        names: list[str] = []
        for part in dict.fromkeys(piece.part for piece in group.pieces):
            names += site_names(site_table, [piece.path for piece in group.pieces if piece.part == part], part)
        sites = tuple(names) if any(name.startswith("re:") for name in names) else " ".join(names)
        configs.append(placed(group.config, sites))
    keys = SiteKeys()
    tensors: dict[str, Tensor] = {}
    for piece in (piece for group in groups for piece in group.pieces):
        key = keys.take(piece.path, piece.part)
        tensors |= {f"{piece.path}.{key}.{name}": tensor for name, tensor in piece.tensors.items()}
    for number, group in enumerate(groups):
        tensors |= {f"{SHARED}{number}.{name}": tensor for name, tensor in group.pieces[0].shared.items()}
    return configs[0] if len(configs) == 1 else Stack(adapters=tuple(configs)), tensors


def _grouped(pieces: Sequence[Piece]) -> list[Group]:
    """Group the pieces by their configs. Where a kind has patterns, pieces that differ only in rank and alpha stay one group."""
    groups: dict[str, Group] = {}
    for piece in pieces:
        plain = piece.config
        if patterned(plain):
            plain = plain.model_copy(update=dict.fromkeys(PATTERNED, 1))
        key = f"{plain.kind} {plain.model_dump_json()} {piece.apart}"
        groups.setdefault(key, Group(piece.config)).pieces.append(piece)
    for group in groups.values():
        if patterned(group.config):
            group.config = _with_patterns(group.config, group.pieces)
    return list(groups.values())


def patterned(config: AdapterConfig) -> bool:
    """Whether the rank and alpha of this kind may differ between sites."""
    return all(pattern in type(config).model_fields for pattern in PATTERNED.values())


def _with_patterns(config: AdapterConfig, pieces: Sequence[Piece]) -> AdapterConfig:
    """Set rank and alpha to their most frequent values, and list the exceptions as patterns of exact module names."""
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
    """Return a trained tensor minus the base's own, in float32.

    A tensor of another shape is returned as it is: the strict copy reports it later, together with all others.
    """
    return whole - base.detach().float().cpu() if whole.shape == base.shape else whole


def site_names(site_table: SiteTable, paths: Iterable[str], part: str = "linear") -> list[str]:
    """Return the shortest site names for exactly these modules; modules that no name covers get a regular expression each.

    E.g. all `q_proj` of a model are `attn.q`, those of layers 2 and 3 are `attn.q@2,3`, and in an encoder-decoder `decoder.attn.q@2,3`.
    """
    left, names = set(paths), []
    for name, sites in (site_table.attentions if part == "prefix" else site_table.by_name).items():
        if name.rpartition(".")[2] in ("linear", "bias"):  # each covers several kinds of modules
            continue
        for stack, own in _by_stack([site for site in sites if site.part == part]).items():
            layers = {site.layer for site in own if site.module in left}
            chosen = [site for site in own if site.layer in layers]
            # A name means all of its modules in the layers that follow it, so it fits only if all of these are wanted. `norm` is used for
            # every norm or not at all: the final norm belongs to no layer.
            if not chosen or any(site.module not in left for site in chosen) or (name == "norm" and chosen != own):
                continue
            span = "" if chosen == own else "@" + ",".join(str(layer) for layer in sorted(layers, key=lambda n: n or 0))
            ambiguous = stack and len(site_table.stacks) > 1 and not name.startswith(f"{stack}.")
            names.append(f"{stack}.{name}{span}" if ambiguous else f"{name}{span}")
            left -= {site.module for site in chosen}
    return names + [f"re:{re.escape(path)}" for path in sorted(left)]


def _by_stack(sites: Sequence[Site]) -> dict[str, list[Site]]:
    found: dict[str, list[Site]] = {}
    for site in sites:
        found.setdefault(stack_of(site.module), []).append(site)
    return found

"""Parts of a model by the names of the site language: which of its own parameters they are.

A name means whole modules here: `attn` is the attention module with all its projections, `mlp` the MLP, `layer@8-15` whole blocks, `embed`
and `head` the tables, `norm` the norms, `re:PATTERN` every module with such a name.
"""

from __future__ import annotations

from typing import ClassVar

from torch import nn

from graft.architectures.language import resolve_sites
from graft.architectures.site import SiteType
from graft.architectures.sites import SiteTable
from graft.architectures.walk import base_parameters
from graft.errors import GraftError

ALL = "all"


class _Request:
    """What the site language is asked for."""

    takes: ClassVar[frozenset[SiteType]] = frozenset({"linear", "sublayer", "embedding", "norm", "other"})

    def __init__(self, kind: str, name: str) -> None:
        self.kind, self.sites = kind, name


def parameters_of(table: SiteTable, kind: str, parts: str | tuple[str, ...]) -> dict[str, dict[str, nn.Parameter]]:
    """Return, for each name, the parameters of a model that it means, by their own names and in the model's order.

    A parameter that several modules share comes once, under its first name. kind: of the method, for messages. Raises `GraftError` for a
    name that matches nothing, has no parameters, or is a slice of a fused projection, and for parameters that are not floating-point.
    """
    own = dict(base_parameters(table.model))
    split = isinstance(parts, str) and not parts.startswith("re:")
    names = tuple(parts.split()) if isinstance(parts, str) and split else (parts,) if isinstance(parts, str) else parts
    found: dict[str, dict[str, nn.Parameter]] = {}
    for name in names:
        chosen = set(map(id, own.values())) if name == ALL else _ids_of(table, kind, name)
        found[name] = {key: each for key, each in own.items() if id(each) in chosen}
        if not found[name]:
            raise GraftError(f"train.method {kind}: '{name}' has no parameters that could train")
    for key, each in (item for group in found.values() for item in group.items()):
        if not each.is_floating_point() or type(each) is not nn.Parameter:
            raise GraftError(
                f"train.method {kind} needs weights in a floating-point format, but '{key}' is quantised: load the base in float32 or "
                "bfloat16, or train an adapter"
            )
    return found


def _ids_of(table: SiteTable, kind: str, name: str) -> set[int]:
    """The ids of the parameters of every module that a name means."""
    ids: set[int] = set()
    for site in resolve_sites(table, _Request(kind, name)):
        if site.features is not None:
            raise GraftError(
                f"train.method {kind}: '{name}' is a slice of a fused projection, which trains as a whole: name attn.qkv instead"
            )
        for path in {site.module, site.source or site.module}:
            ids |= {id(each) for each in table.model.get_submodule(path).parameters()}
    return ids

"""Where AdapterHub's own model classes keep their adapters, by model type, and the prefixes of its tensors' names."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from graft.errors import GraftError
from graft.formats.folder import SiteAdapter
from graft.injection.state import site_table_of

CONTAINERS = ("llama", "mistral", "gpt2", "gptj")
"""Model types that keep adapters in `attention_adapters` and `output_adapters` of each block."""
DENSE = ("bert", "roberta", "electra", "xlm-roberta")
"""Model types that keep an adapter next to the sublayer's last layer."""
T5_TYPES = ("t5", "mt5")
"""Model types that keep an adapter in `layer.N` of the block."""
KNOWN = (*CONTAINERS, *DENSE, *T5_TYPES)
REVERSED = ("llama", "mistral")
"""Model types for which the library calls the MLP's down projection the intermediate layer, and its up projection the output layer."""
MLP_AFTER_ATTENTION = ("gptj",)
"""Model types that run attention and MLP in parallel, but the library's adapters at the MLP read the residual stream after attention."""


def model_type(root: nn.Module) -> str:
    """Return the model's type. Raises `GraftError` if Graft does not know where the library keeps its adapters."""
    kind = str(root.config.model_type)  # pyright: ignore[reportAttributeAccessIssue]
    if kind not in KNOWN:
        raise GraftError(
            f"Graft does not know where AdapterHub keeps the adapters of a '{kind}'; it knows {', '.join(KNOWN)}"
        )
    return kind


def outer(root: nn.Module) -> str:
    """Return the prefix of tensors that belong to the whole base: `bert.`, `model.`, nothing for T5 or a base without a head."""
    prefix = getattr(root, "base_model_prefix", "")
    return f"{prefix}." if prefix in dict(root.named_children()) else ""


def bottleneck_prefix(root: nn.Module, adapter: SiteAdapter, name: str) -> str:
    """Return the prefix of the names of a bottleneck's tensors."""
    kind, site = model_type(root), adapter.installed.site
    if kind in CONTAINERS:
        block = next(block.path for block in site_table_of(root).blocks if site.module.startswith(f"{block.path}."))
        return f"{block}.{'attention' if site.part == 'attn' else 'output'}_adapters.adapters.{name}."
    if kind in DENSE:
        return f"{site.module.rpartition('.')[0]}.adapters.{name}."
    head, number = site.module.split(".layer.")[0], site.module.split(".layer.")[1].split(".")[0]
    return f"{head}.layer.{number}.adapters.{name}."


def left_out(root: nn.Module, adapters: Sequence[SiteAdapter], names: Sequence[str]) -> list[int]:
    """Return the layers without an adapter. names: the sites, all of which each other layer must adapt.

    Raises `GraftError` for gaps within a layer, and in encoder-decoders for any: the library would fill them with untrained adapters.
    """
    site_table, paths = site_table_of(root), {adapter.path for adapter in adapters}
    every = [site for name in names for site in site_table.by_name.get(name, [])]
    layers = {site.layer for site in every if site.module in paths}
    gaps = [site.module for site in every if site.layer in layers and site.module not in paths]
    missing = sorted({block.number for block in site_table.blocks} - {layer for layer in layers if layer is not None})
    if gaps or (missing and len(site_table.stacks) > 1):
        where = gaps[0] if gaps else f"layers {missing}"
        raise GraftError(
            f"AdapterHub can leave out whole layers only, and none in encoder-decoders; this adapter leaves out '{where}', where the "
            "library would put an untrained one"
        )
    return missing


def differing(adapters: Sequence[SiteAdapter]) -> bool:
    """Whether settings differ between sites."""
    return len({adapter.config.model_copy(update={"sites": ""}).model_dump_json() for adapter in adapters}) > 1


def refuse(what: str, wrong: dict[str, Any]) -> None:
    """Raise `GraftError` with every reason that is true. what: the kind, for the message."""
    reasons = [reason for reason, holds in wrong.items() if holds]
    if reasons:
        raise GraftError(f"AdapterHub's {what} cannot hold {' or '.join(reasons)}: keep Graft's format, or try PEFT's")

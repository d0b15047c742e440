"""Where AdapterHub's own model classes keep what they add, by model type, and how the names of its tensors begin."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from graft.errors import GraftError
from graft.formats.peft.folder import Held
from graft.injection.state import site_table_of

CONTAINERS = ("llama", "mistral", "gpt2", "gptj")
"""Model types whose blocks hold `attention_adapters` and `output_adapters`."""
DENSE = ("bert", "roberta", "electra", "xlm-roberta")
"""Model types whose adapters sit beside the sublayer's last layer."""
BEHIND = ("t5", "mt5")
"""Model types whose adapters sit in `layer.N` of the block."""
KNOWN = (*CONTAINERS, *DENSE, *BEHIND)
REVERSED = ("llama", "mistral")
"""Model types where the library takes the MLP's last layer for its intermediate one, and its up projection for the output."""

STREAM_GOES_ON = ("gptj",)
"""Model types whose attention and MLP stand side by side, and whose MLP has in the library a residual stream behind the attention."""


def model_type(root: nn.Module) -> str:
    """The model's type. Raises `GraftError` for one whose places are not known here."""
    kind = str(root.config.model_type)  # pyright: ignore[reportAttributeAccessIssue]
    if kind not in KNOWN:
        raise GraftError(
            f"where AdapterHub has the adapters of a '{kind}' is not known here; known: {', '.join(KNOWN)}"
        )
    return kind


def outer(root: nn.Module) -> str:
    """How the name of a tensor of the whole base begins: `bert.`, `model.`, nothing for T5 and for a base without a head."""
    prefix = getattr(root, "base_model_prefix", "")
    return f"{prefix}." if prefix in dict(root.named_children()) else ""


def bottleneck_prefix(root: nn.Module, held: Held, name: str) -> str:
    """How the names of a bottleneck's tensors begin."""
    kind, site = model_type(root), held.installed.site
    if kind in CONTAINERS:
        block = next(block.path for block in site_table_of(root).blocks if site.module.startswith(f"{block.path}."))
        return f"{block}.{'attention' if site.part == 'attn' else 'output'}_adapters.adapters.{name}."
    if kind in DENSE:
        return f"{site.module.rpartition('.')[0]}.adapters.{name}."
    head, number = site.module.split(".layer.")[0], site.module.split(".layer.")[1].split(".")[0]
    return f"{head}.layer.{number}.adapters.{name}."


def left_out(root: nn.Module, installs: Sequence[Held], names: Sequence[str]) -> list[int]:
    """Layers without an adapter, where the others have one at every site of these names.

    Raises `GraftError` for gaps in a layer: the library would put a fresh adapter there.
    """
    site_table, paths = site_table_of(root), {held.path for held in installs}
    every = [site for name in names for site in site_table.by_name.get(name, [])]
    layers = {site.layer for site in every if site.module in paths}
    gaps = [site.module for site in every if site.layer in layers and site.module not in paths]
    missing = sorted({block.number for block in site_table.blocks} - {layer for layer in layers if layer is not None})
    if gaps or (missing and len(site_table.stacks) > 1):
        where = gaps[0] if gaps else f"layers {missing}"
        raise GraftError(
            f"AdapterHub leaves out whole layers alone, and in encoder-decoders none here; this adapter leaves out '{where}', where the "
            "library would put a fresh one"
        )
    return missing


def differing(installs: Sequence[Held]) -> bool:
    """Whether settings differ between sites."""
    return len({held.config.model_copy(update={"sites": ""}).model_dump_json() for held in installs}) > 1


def refuse(what: str, wrong: dict[str, Any]) -> None:
    """Raise `GraftError` that lists every key whose value holds."""
    said = [reason for reason, holds in wrong.items() if holds]
    if said:
        raise GraftError(
            f"AdapterHub's {what} cannot say {' or '.join(said)}: keep Graft's format, or see whether PEFT's can"
        )

"""AdapterHub's invertible adapters (`inv_adapter: nice`), read and written: a part of a bottleneck adapter's config.

The library puts the coupling after an encoder's embeddings with their norm, and in a causal model after the token embedding. The inverse
before the output head comes only with the heads of its own model classes (LlamaAdapterModel); with transformers' classes
(LlamaForCausalLM) it computes none.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from graft.adapters.kinds.invertible import Invertible
from graft.architectures.site import Site
from graft.errors import GraftError
from graft.formats.adapterhub.bottlenecks import ACTIVATIONS
from graft.formats.adapterhub.file import HubFile
from graft.formats.adapterhub.places import DENSE, T5_TYPES, model_type, outer, refuse
from graft.formats.composing import Piece
from graft.formats.folder import Folder, SiteAdapter
from graft.injection.state import site_table_of

LAYERS = [f"{which}.{number}.{end}" for which in "FG" for number in (0, 2) for end in ("weight", "bias")]
"""The tensors of a coupling, under the names of both libraries."""


def _places(model: nn.Module, inverse: bool = False) -> list[Site]:
    """Return the sites of the coupling and, if asked for, of its inverse. Raises `GraftError` where Graft does not know them."""
    table, kind = site_table_of(model), model_type(model)
    embed, head = table.end("embed"), table.end("head")
    if kind in T5_TYPES or embed is None or (kind in DENSE and head is not None):
        raise GraftError(
            f"Graft knows where AdapterHub's invertible adapters act in causal models and in encoders without a language model's head, "
            f"but not in {type(model).__name__}"
        )
    if kind in DENSE:
        path = embed.module.rpartition(".")[0]  # embeddings.word_embeddings -> embeddings
        return [table.whole(f"re:{path}", path, model.get_submodule(path), None)]
    return [embed, head] if inverse and head is not None else [embed]


def read_invertible(file: HubFile, config: Mapping[str, Any]) -> list[Piece]:
    """Read the coupling beside a bottleneck adapter, if the config has one."""
    form = config.get("inv_adapter")
    if not form:
        return []
    if form != "nice":
        raise GraftError(
            f"{file.folder} has invertible adapters of form '{form}', which Graft has no kind for (it has nice)"
        )
    tail = f"invertible_adapters.{file.name}.F.0.weight"
    prefix = next((key for key in file.left if key.endswith(tail)), tail).removesuffix("F.0.weight")
    tensors = {name: file.take(f"{prefix}{name}") for name in LAYERS}
    first = tensors["F.0.weight"]
    reduction = max(1, first.shape[1] // max(1, len(first))) if first.dim() == 2 else 1
    activation = str(config["non_linearity"]).lower()
    kind = Invertible(reduction=reduction, activation=ACTIVATIONS.get(activation, activation))
    own_class = str(file.config.get("model_class")).endswith("AdapterModel")
    return [Piece(site.module, kind, {}, site.part, shared=tensors) for site in _places(file.model, own_class)]


def write_invertible(
    root: nn.Module, adapters: Sequence[SiteAdapter], configs: Sequence[dict[str, Any]], folder: Folder, name: str
) -> None:
    """Write the coupling, and put it into the config of the bottleneck adapter that stands beside it."""
    config = adapters[0].config
    beside = [each for each in configs if "reduction_factor" in each]
    refuse("invertible adapters", {
        "a coupling without one bottleneck adapter beside it (it is a part of that one's config)": len(beside) != 1,
        "an inverse before the head, which it does not compute in transformers' own classes (set sites: embed)": (
            {each.path for each in adapters} != {site.module for site in _places(root)}
        ),
        "coupling: glow (the layout of its tensors is not known here)": config.coupling != "nice",
        f"activation: {config.activation} beside a bottleneck of another": bool(beside) and config.activation != ACTIVATIONS.get(
            beside[0]["non_linearity"], beside[0]["non_linearity"]
        ),
    })  # fmt: skip
    own = dict(adapters[0].module._shared[0].named_parameters())
    folder.tensors |= {f"{outer(root)}invertible_adapters.{name}.{key}": own[key] for key in LAYERS}
    beside[0].update(inv_adapter="nice", inv_adapter_reduction_factor=config.reduction)

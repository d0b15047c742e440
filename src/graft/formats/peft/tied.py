"""The tables of a base, which have a row for each token: its input embedding, its output head, and what is tied to the embedding."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from graft.architectures.walk import base_submodules

TABLES = ("embed_tokens", "lm_head")
"""The last parts of names by which PEFT knows a table."""


def ends(model: nn.Module) -> dict[str, Any]:
    """The input embedding and the output head by path, each if the model has one. The embedding comes first."""
    found: dict[str, Any] = {}
    for getter in ("get_input_embeddings", "get_output_embeddings"):
        module = getattr(model, getter, lambda: None)()
        path = next((path for path, other in base_submodules(model) if other is module), None)
        if module is not None and path is not None:
            found[path] = module
    return found


def tied_tables(model: nn.Module) -> list[str]:
    """The paths of the tables that share the weight of the input embedding and are called, itself included; embeddings come first.

    T5 and BART list one table as `shared` and call modules tied to it.
    """
    path, embedding = next(iter(ends(model).items()), ("", None))
    weight = getattr(embedding, "weight", None)  # a model of sound has a list of tables, which has none
    every = {name: module for name, module in base_submodules(model) if is_table(module)}
    found = [name for name, module in every.items() if weight is not None and module.weight is weight]
    embeddings = sorted(name for name in found if isinstance(every[name], nn.Embedding))
    if len(embeddings) > 1 and path.endswith("shared"):
        embeddings.remove(path)
    return embeddings + sorted(name for name in found if not isinstance(every[name], nn.Embedding))


def is_table(module: nn.Module) -> bool:
    """Whether a module may have a row for each token."""
    return isinstance(module, nn.Embedding | nn.Linear)


def tied_with(model: nn.Module, names: Sequence[str]) -> list[str]:
    """The tied tables if one of these names is a table's, else none. PEFT's `ensure_weight_tying` adapts all of them then."""
    tied = tied_tables(model)
    return tied if len(tied) > 1 and any(name.rpartition(".")[2] in TABLES for name in names) else []

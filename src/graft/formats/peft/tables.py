"""Embeddings and heads that PEFT stores as a whole or by rows: tables that it saves by itself, and the vectors of trained tokens.

PEFT saves the tables of a base whose vocabulary was extended. What it calls a table depends on what else is there:

    <embedding>.weight                                    nothing
    <embedding>.base_layer.weight                         LoRA or trained tokens as a kind of their own
    <embedding>.token_adapter.base_layer.weight           trained tokens beside another kind
    <embedding>.original_module.weight                    the embedding is saved as a module, which takes its place

Legend: V tokens of a table, N trained tokens, D features.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from graft.adapters.kinds.full import Full
from graft.architectures.walk import base_submodules
from graft.errors import GraftError, listed
from graft.formats.composing import Piece, difference
from graft.formats.peft.file import PeftFile
from graft.formats.peft.targets import targets
from graft.formats.peft.tied import ends, is_table, tied_tables

VECTORS = "trainable_tokens_delta"
INNER = ("", "base_layer.", "token_adapter.base_layer.")
"""What stands before `weight` in the name of a table, after the module's path."""


def table_pieces(file: PeftFile, model: nn.Module, trained: Mapping[str, list[int]]) -> list[Piece]:
    """Read the tables that PEFT saved by itself. trained: the rows of each that another piece holds, which the table leaves alone."""
    pieces: list[Piece] = []
    for path, module in base_submodules(model):
        inner = next((each for each in INNER if f"{path}.{each}weight" in file.left), None)
        if inner is None or not isinstance(module, nn.Embedding | nn.Linear):
            continue
        delta = difference(file.take(f"{path}.{inner}weight"), module.weight)
        tensors = {"weight": delta}
        if f"{path}.{inner}bias" in file.left and module.bias is not None:
            tensors["bias"] = difference(file.take(f"{path}.{inner}bias"), module.bias)  # pyright: ignore[reportArgumentType]
        if delta.shape == module.weight.shape:
            delta[trained.get(path, [])] = 0
        if delta.shape != module.weight.shape or any(tensor.any() for tensor in tensors.values()):
            pieces.append(Piece(path, Full(train_bias="bias" in tensors), tensors, _part(module)))
    return as_tied(model, pieces)


def as_tied(model: nn.Module, pieces: list[Piece]) -> list[Piece]:
    """Let the tables that are tied to the input embedding follow it if all hold the same difference; else each gets its own.

    A table that follows has no tensors.
    """
    by_path, tied = {piece.path: piece for piece in pieces}, tied_tables(model)
    own = [by_path[path] for path in tied if path in by_path]
    same = all(_equal(piece.tensors, own[0].tensors) for piece in own)
    found = [piece for piece in pieces if piece.path not in tied]
    for number, piece in enumerate(own):
        tensors = {} if same and number else piece.tensors
        found.append(Piece(piece.path, piece.config, tensors, piece.part, apart="tied" if same else piece.path))
    return found


def _equal(own: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> bool:
    return own.keys() == other.keys() and all(tensor.equal(other[name]) for name, tensor in own.items())


def token_pieces(file: PeftFile, model: nn.Module) -> list[Piece]:
    """Read trained tokens beside any kind, by PEFT's rule for which modules have vectors of their own.

    `trainable_token_indices` is a list for the input embedding, or a list for each module by the end of its name. A head that is tied to
    the embedding follows it, unless it has another list.
    """
    given = file.config.get("trainable_token_indices")
    if given is None:
        return []
    by_name: dict[str, list[int]] = (
        given if isinstance(given, dict) else {next(iter(ends(model)), "embed_tokens"): given}
    )
    chosen: dict[str, Any] = {}
    for name, ids in by_name.items():
        paths = [path for path, module in base_submodules(model) if path.endswith(name) and is_table(module)]
        if not paths:
            raise GraftError(
                f"{file.folder}: trainable_token_indices names '{name}', and this base has no table of that name"
            )
        chosen |= dict.fromkeys(paths, ids)
    return _pieces(file, model, chosen, "token_adapter.")


def read_tokens(file: PeftFile, model: nn.Module) -> list[Piece]:
    """Read trained tokens as a kind of their own: the same rows of every table that `target_modules` names."""
    names = (
        [path for path, _ in targets(file, model, (f".{VECTORS}",))]
        if file.config["target_modules"]
        else list(ends(model))[:1]
    )
    return _pieces(file, model, dict.fromkeys(names, file.config["token_indices"]), "")


def _pieces(file: PeftFile, model: nn.Module, chosen: Mapping[str, Any], inner: str) -> list[Piece]:
    """Return the pieces of trained tokens. chosen: the ids by the path of a table. inner: what stands before the name of the vectors."""
    pieces: list[Piece] = []
    embedding, tied = next(iter(ends(model)), ""), tied_tables(model)
    following = [
        path for path in tied if embedding in chosen and chosen.get(path, chosen[embedding]) == chosen[embedding]
    ]
    for path, ids in chosen.items():
        if path in following and path != embedding:
            continue
        table: Any = model.get_submodule(path)
        _check_ids(file, table, path, ids)
        start, vectors = table.weight.detach().float().cpu()[ids], file.take(f"{path}.{inner}{VECTORS}")
        tensors, config = {"weight": difference(vectors, start), "start": start}, Full(tokens=tuple(ids))
        if path != embedding:
            pieces.append(Piece(path, config, tensors, _part(table)))
            continue
        for number, other in enumerate(following or [path]):
            if not vectors.equal(file.left.pop(f"{other}.{inner}{VECTORS}", vectors)):
                raise GraftError(
                    f"{file.folder} holds two different tensors for the trained tokens of '{other}', which is tied to '{path}'"
                )
            pieces.append(Piece(other, config, {} if number else tensors, _part(model.get_submodule(other))))
    return pieces


def _part(table: nn.Module) -> str:
    return "embedding" if isinstance(table, nn.Embedding) else "linear"


def _check_ids(file: PeftFile, table: Any, path: str, ids: list[int]) -> None:
    rows = len(table.weight)
    if not ids or len(set(ids)) != len(ids) or min(ids) < 0:
        raise GraftError(f"{file.folder}: the trained tokens of '{path}' must be ids from 0 on, each once; given {ids}")
    if beyond := [str(token) for token in ids if token >= rows]:
        raise GraftError(
            f"{file.folder} trains the rows of tokens {listed(beyond)}, but '{path}' of this base has {rows} rows: the adapter was made "
            "for a base with added tokens. Load it with resize=True (base.resize: auto)"
        )
    if not isinstance(table, nn.Embedding) and table.bias is not None:
        raise GraftError(
            f"{file.folder}: PEFT leaves out the bias of '{path}' where it trains rows of it, which no kind of Graft does"
        )

"""What PEFT stores as a whole and not as an update, beside any kind: modules, norms, biases, and the vectors of trained tokens.

Graft holds each as a difference to the base.

Legend: O output features, V tokens of a table, N trained tokens, D features.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from graft.adapters.base import Adapter
from graft.adapters.kinds.bitfit import BitFit
from graft.adapters.kinds.full import Full
from graft.adapters.surroundings import Surroundings
from graft.architectures.layers import is_linear, is_transposed
from graft.architectures.walk import base_parameters, base_submodules
from graft.errors import GraftError
from graft.formats.composing import Piece, difference
from graft.formats.folder import Folder, SiteAdapter
from graft.formats.foreign import AdapterFile
from graft.formats.peft.targets import targets


def read_wholes(file: AdapterFile, model: nn.Module) -> list[Piece]:
    """Read what a file of any kind may also hold: saved modules, whole embeddings, trained tokens, biases of other modules."""
    pieces = _saved_modules(file, model)
    for path, module in base_submodules(model):
        table = f"{path}.base_layer.weight"
        if table in file.left:  # PEFT adds the embedding itself to a LoRA on it, in case it was resized
            weight: Any = module.weight
            delta = difference(file.take(table), weight)
            if delta.shape != weight.shape or delta.any():
                pieces.append(Piece(path, Full(), {"weight": delta}, "embedding"))
        vectors = f"{path}.token_adapter.trainable_tokens_delta"
        if vectors in file.left:
            pieces += _token_pieces(model, path, file.take(vectors), _token_ids(file, path))
        if file.config.get("bias") == "all" and f"{path}.bias" in file.left:
            pieces.append(_bias_piece(file, path, module))
    return pieces


def _saved_modules(file: AdapterFile, model: nn.Module) -> list[Piece]:
    """Read the modules that `modules_to_save` matches; as in PEFT, a name matches every path that ends in it."""
    wanted = tuple(file.config.get("modules_to_save") or ())
    pieces = []
    for path, module in base_submodules(model) if wanted else ():
        if not path.endswith(wanted):
            continue
        own = dict(base_parameters(module))
        if not any(f"{path}.{name}" in file.left for name in own):
            continue
        tensors = {name: difference(_saved(file, path, name), parameter) for name, parameter in own.items()}
        part = "linear" if is_linear(module) else "embedding" if isinstance(module, nn.Embedding) else "norm"
        pieces.append(Piece(path, Full(train_bias=part == "linear" and "bias" in tensors), tensors, part))
    return pieces


def _saved(file: AdapterFile, path: str, name: str) -> Tensor:
    """Take a tensor of a saved module. With `bias: all` PEFT writes the module's bias three times, and all copies are taken."""
    whole = file.take(f"{path}.{name}")
    if file.left.pop(f"{path}.modules_to_save.{name}", whole).ne(whole).any():
        raise GraftError(f"{file.folder} holds two different tensors for '{path}.{name}'")
    file.left.pop(f"{path}.original_module.{name}", None)
    return whole


def _bias_piece(file: AdapterFile, path: str, module: Any) -> Piece:
    part = "linear" if is_linear(module) else "norm"
    return Piece(path, BitFit(), {"bias": difference(file.take(f"{path}.bias"), module.bias)}, part)


def _token_ids(file: AdapterFile, path: str) -> list[int]:
    """Return the ids of the trained tokens of a table: the config has one list, or a list for each module."""
    given = file.config.get("trainable_token_indices") or file.field("token_indices")
    if isinstance(given, dict):
        given = next(ids for name, ids in given.items() if path == name or path.endswith(f".{name}"))
    return list(given)


def _token_pieces(model: nn.Module, path: str, vectors: Tensor, ids: list[int]) -> list[Piece]:
    """Return the pieces for trained tokens [N, D] of a table [V, D]; an output head tied to the table gets a piece that follows it."""
    table: Any = model.get_submodule(path)
    start = table.weight.detach().float()[ids]
    tensors = {"weight": difference(vectors, start), "start": start}
    config = Full(tokens=tuple(ids))
    pieces = [Piece(path, config, tensors, "embedding" if isinstance(table, nn.Embedding) else "linear")]
    head = getattr(model, "get_output_embeddings", lambda: None)()
    if head is not None and head.weight is table.weight and head is not table:
        pieces.append(Piece(next(p for p, m in model.named_modules() if m is head), config, {}, "linear"))
    return pieces


def read_tokens(file: AdapterFile, model: nn.Module) -> list[Piece]:
    """Read trainable tokens as a kind of their own: the vectors of one table."""
    pieces = []
    for path, _ in targets(file, model, (".trainable_tokens_delta",)):
        vectors = file.take(f"{path}.trainable_tokens_delta")
        # The file repeats them for a tied head.
        for again in [name for name in file.left if name.endswith(".trainable_tokens_delta")]:
            if torch.equal(file.left[again].float(), vectors):
                file.left.pop(again)
        pieces += _token_pieces(model, path, vectors, list(file.field("token_indices")))
    return pieces


def read_norms(file: AdapterFile, model: nn.Module) -> list[Piece]:
    """Read LN tuning, which stores each norm whole."""
    pieces = []
    for path, module in targets(file, model, (".ln_tuning_layers.",)):
        own = dict(base_parameters(module))
        tensors = {name: difference(file.take(f"{path}.ln_tuning_layers.{name}"), p) for name, p in own.items()}
        pieces.append(Piece(path, Full(), tensors, "norm"))
    return pieces


@torch.no_grad()
def write_wholes(root: nn.Module, adapters: Sequence[SiteAdapter], folder: Folder, alone: bool) -> None:
    """Write full modules as `modules_to_save`, and trained tokens as `trainable_token_indices`.

    alone: whether the folder holds no other kind. Raises `GraftError` then, because PEFT has no such folder.
    """
    if alone:
        raise GraftError(
            "PEFT holds whole modules and trained tokens only together with another kind (modules_to_save, trainable_token_indices): "
            "stack them with a lora, or keep Graft's format"
        )
    names, tokens = [], {}
    for adapter in adapters:
        if getattr(adapter.config, "tokens", ()):
            if adapter.module.follows is None:  # a tied head has no vectors of its own
                tokens[adapter.path] = list(adapter.config.tokens)
                folder.tensors[f"{adapter.path}.token_adapter.trainable_tokens_delta"] = adapter.module.rows_now()
            continue
        names.append(adapter.path)
        whole = _whole_tensors(root.get_submodule(adapter.path), adapter.module)
        folder.tensors |= {f"{adapter.path}.{name}": tensor for name, tensor in whole.items()}
    if names:
        folder.config["modules_to_save"] = names
    if tokens:
        folder.config["trainable_token_indices"] = tokens


def _whole_tensors(host: Any, module: Adapter) -> dict[str, Tensor]:
    """Return the module's tensors with the adapter folded in, as the module stores them."""
    folded = module.fold_all()
    if folded is not None:
        return folded
    stored = Surroundings(host).weight().detach()  # [O, I]
    bias = getattr(host, "bias", None)
    whole, whole_bias = module.fold(stored.float(), None if bias is None else bias.detach().float())
    found = {"weight": whole.t() if is_transposed(host) else whole}
    return found if whole_bias is None else {**found, "bias": whole_bias}

"""What PEFT stores as a whole and not as an update, beside any kind: modules, norms and biases.

Graft holds each as a difference to the base.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from graft.adapters.base import Adapter
from graft.adapters.kinds.bitfit import BitFit
from graft.adapters.kinds.full import Full
from graft.adapters.surroundings import Surroundings
from graft.architectures.layers import is_linear, is_norm, is_transposed
from graft.architectures.walk import base_parameters, base_submodules
from graft.errors import GraftError
from graft.formats.composing import Piece, difference
from graft.formats.folder import Folder, SiteAdapter
from graft.formats.peft.file import PeftFile
from graft.formats.peft.tables import as_tied, table_pieces, token_pieces
from graft.formats.peft.targets import targets
from graft.formats.peft.tied import tied_with


def read_wholes(file: PeftFile, model: nn.Module) -> list[Piece]:
    """Read what a file of any kind may also hold: saved modules, whole embeddings, trained tokens, biases of other modules."""
    tokens = token_pieces(file, model)
    pieces = _saved_modules(file, model) + tokens
    trained = {piece.path: list(piece.config.tokens) for piece in tokens}  # pyright: ignore[reportAttributeAccessIssue]
    return pieces + table_pieces(file, model, trained) + _biases(file, model)


def _saved_modules(file: PeftFile, model: nn.Module) -> list[Piece]:
    """Read the modules that `modules_to_save` matches; as in PEFT, a name matches every path that ends in it."""
    wanted = tuple(_saved_names(file, model))
    named = [(path, module) for path, module in base_submodules(model) if wanted and path.endswith(wanted)]
    saved = [path for path, module in named if next(module.parameters(), None) is not None]
    pieces = []
    for path in saved:
        if outer := next((other for other in saved if path.startswith(f"{other}.")), None):
            raise GraftError(f"{file.folder}: modules_to_save names '{outer}' and '{path}', which is a part of it")
        for inner, module in _holders(path, model.get_submodule(path)):
            own = dict(base_parameters(module))
            tensors = {name: difference(_saved(file, path, f"{inner}.{name}"), each) for name, each in own.items()}
            if is_transposed(module):
                tensors["weight"] = tensors["weight"].t().contiguous()
            part = _part(module)
            pieces.append(Piece(inner, Full(train_bias=part == "linear" and "bias" in tensors), tensors, part))
    return _as_saved(file, model, pieces)


def _saved_names(file: PeftFile, model: nn.Module) -> list[str]:
    """Return the names in `modules_to_save`. `ensure_weight_tying` adds the embedding and what is tied to it if one of them is named."""
    names: list[str] = file.config.get("modules_to_save") or []
    return names + (tied_with(model, names) if file.config.get("ensure_weight_tying") else [])


def _as_saved(file: PeftFile, model: nn.Module, pieces: list[Piece]) -> list[Piece]:
    """Tie a head to the embedding where they hold the same. `ensure_weight_tying` says that they do."""
    tied = as_tied(model, pieces)
    if file.config.get("ensure_weight_tying") and (
        wrong := [piece.path for piece in tied if piece.apart == piece.path]
    ):
        raise GraftError(
            f"{file.folder}: ensure_weight_tying says that '{wrong[0]}' holds what the embedding holds, but the file differs"
        )
    return tied


def _holders(path: str, module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield what can be trained one by one: the module itself, if it has parameters of its own, or those of its children that have."""
    if next(module.parameters(recurse=False), None) is not None:
        yield path, module
        return
    for name, child in module.named_children():
        if name != "graft":
            yield from _holders(f"{path}.{name}", child)


def _part(module: nn.Module) -> str:
    kinds = {"linear": is_linear, "embedding": lambda each: isinstance(each, nn.Embedding), "norm": is_norm}
    return next((part for part, fits in kinds.items() if fits(module)), "other")


def _saved(file: PeftFile, path: str, name: str) -> Tensor:
    """Take a tensor of a saved module. With `bias: all`, and where it saves tables by itself, PEFT writes the module up to three times."""
    inner = name.removeprefix(path)
    whole = file.take(name)
    if file.left.pop(f"{path}.modules_to_save{inner}", whole).ne(whole).any():
        raise GraftError(f"{file.folder} holds two different tensors for '{name}'")
    file.left.pop(f"{path}.original_module{inner}", None)
    return whole


def _biases(file: PeftFile, model: nn.Module) -> list[Piece]:
    """Read the biases that `bias` says were trained too: of the adapted layers, and of all others if it is `all`."""
    pieces = []
    for path, module in base_submodules(model) if (file.config.get("bias") or "none") != "none" else ():
        name = next((each for each in (f"{path}.base_layer.bias", f"{path}.bias") if each in file.left), None)
        own = getattr(module, "bias", None)
        if name is not None and isinstance(own, Tensor):
            delta = difference(file.take(name), own)
            if delta.any() or delta.shape != own.shape:
                pieces.append(Piece(path, BitFit(), {"bias": delta}, "linear" if is_linear(module) else "norm"))
    return pieces


def read_norms(file: PeftFile, model: nn.Module) -> list[Piece]:
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

"""PEFT's LoRA with its variants that change what is computed (rsLoRA, DoRA, lora_bias, patterns, embeddings), and AdaLoRA, LoHa, LoKr.

Legend: R rank, I input, O output features, V rows of a table.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from graft.adapters.kinds.bitfit import BitFit
from graft.adapters.kinds.dora import DoRA
from graft.adapters.kinds.full import Full
from graft.adapters.kinds.lora import LoRA
from graft.architectures.layers import is_linear
from graft.errors import GraftError
from graft.formats.composing import Piece, difference
from graft.formats.foreign import Checkpoint
from graft.formats.peft.experts import parameter_pieces
from graft.formats.peft.residuals import beside_residual, start_of
from graft.formats.peft.targets import by_pattern, targets

UNKNOWN = (
    "use_qalora", "use_bdlora", "alora_invocation_tokens", "arrow_config", "kasa_config", "monteclora_config", "velora_config",
    "layer_replication", "megatron_config",
)  # fmt: skip
"""Variants of PEFT's LoRA that Graft has no equal of."""


def read_lora(file: Checkpoint, model: nn.Module) -> list[Piece]:
    """The pieces of a LoRA or DoRA file. Raises `GraftError` for variants without an equal."""
    config = file.config
    for field in UNKNOWN:
        if config.get(field):
            raise GraftError(f"{file.folder}: PEFT's LoRA with {field} has no equal in Graft")
    start = start_of(file)
    settings = {"dropout": config.get("lora_dropout") or 0.0, "rslora": bool(config.get("use_rslora"))}
    pieces = parameter_pieces(file, model, settings)
    if start is not None and (pieces or config.get("use_dora")):
        raise GraftError(
            f"{file.folder}: init_lora_weights '{start}' together with DoRA or target_parameters has no equal in Graft"
        )
    if pieces and not _at_modules(file):
        return pieces
    marks = (".lora_A.", ".lora_embedding_A")
    read = [(_lora_piece(file, path, module, settings), module) for path, module in targets(file, model, marks)]
    return [piece if start is None else beside_residual(file, piece, module, start) for piece, module in read] + pieces


def _at_modules(file: Checkpoint) -> bool:
    """Whether a file with LoRAs on parameters has others at modules."""
    wanted = file.config.get("target_modules")
    return any(".lora_" in name for name in file.left) if wanted is None else bool(wanted)


def _lora_piece(file: Checkpoint, path: str, module: nn.Module, settings: dict[str, Any]) -> Piece:
    config = file.config
    fields: dict[str, Any] = {
        "rank": by_pattern(path, config.get("rank_pattern"), file.field("r")),
        "alpha": float(by_pattern(path, config.get("alpha_pattern"), file.field("lora_alpha"))),
        **settings,
    }
    if isinstance(module, nn.Embedding):
        tensors = {"A": file.take(f"{path}.lora_embedding_A"), "B": file.take(f"{path}.lora_embedding_B")}
        return Piece(path, LoRA(**fields), tensors, "embedding")
    if not is_linear(module):
        raise GraftError(
            f"{file.folder}: '{path}' is a {type(module).__name__}; LoRA is read at linear layers and embeddings"
        )
    tensors = {"A": file.take(f"{path}.lora_A.weight"), "B": file.take(f"{path}.lora_B.weight")}
    bias = torch.zeros(())
    if config.get("lora_bias"):
        bias = bias + file.take(f"{path}.lora_B.bias") * LoRA(**fields).scale
    if config.get("bias", "none") != "none" and getattr(module, "bias", None) is not None:
        bias = bias + difference(file.take(_bias_name(file, path)), module.bias)  # pyright: ignore[reportArgumentType]
    if bias.dim():
        tensors["bias"] = bias
    fields["train_bias"] = "bias" in tensors
    if not config.get("use_dora"):
        return Piece(path, LoRA(**fields), tensors)
    return Piece(path, DoRA(**fields), {**tensors, "magnitude": file.take(f"{path}.lora_magnitude_vector")})


def _bias_name(file: Checkpoint, path: str) -> str:
    inner = f"{path}.base_layer.bias"
    return inner if inner in file.left else f"{path}.bias"


def extra_pieces(file: Checkpoint, model: nn.Module) -> list[Piece]:
    """What any file may hold besides its kind: modules_to_save, trainable tokens, biases of other modules, whole embeddings."""
    pieces = _saved_modules(file, model)
    for path, module in _modules(model):
        whole = f"{path}.base_layer.weight"
        if whole in file.left:  # written beside a LoRA on an embedding, as the table may have grown
            delta = difference(file.take(whole), module.weight)  # pyright: ignore[reportArgumentType]
            if delta.shape != module.weight.shape or delta.any():
                pieces.append(Piece(path, Full(), {"weight": delta}, "embedding"))
        rows = f"{path}.token_adapter.trainable_tokens_delta"
        if rows in file.left:
            pieces += token_pieces(model, path, file.take(rows), _token_ids(file, path))
        if file.config.get("bias") == "all" and f"{path}.bias" in file.left:
            pieces.append(_bias_piece(file, path, module))
    return pieces


def _modules(model: nn.Module) -> list[tuple[str, Any]]:
    return [(path, module) for path, module in model.named_modules() if path and "graft" not in path.split(".")]


def _saved_modules(file: Checkpoint, model: nn.Module) -> list[Piece]:
    """Modules that the file holds whole, by the end of their names as PEFT does it, as differences to the base."""
    wanted = tuple(file.config.get("modules_to_save") or ())
    pieces = []
    for path, module in _modules(model) if wanted else ():
        if not path.endswith(wanted):
            continue
        own = {name: parameter for name, parameter in module.named_parameters() if "graft" not in name.split(".")}
        if not any(f"{path}.{name}" in file.left for name in own):
            continue
        tensors = {name: difference(_saved(file, path, name), parameter) for name, parameter in own.items()}
        part = "linear" if is_linear(module) else "embedding" if isinstance(module, nn.Embedding) else "norm"
        pieces.append(Piece(path, Full(train_bias=part == "linear" and "bias" in tensors), tensors, part))
    return pieces


def _saved(file: Checkpoint, path: str, name: str) -> Tensor:
    """A tensor of a saved module. `bias: all` writes the biases of such a module three times."""
    whole = file.take(f"{path}.{name}")
    if file.left.pop(f"{path}.modules_to_save.{name}", whole).ne(whole).any():
        raise GraftError(f"{file.folder} holds two different tensors for '{path}.{name}'")
    file.left.pop(f"{path}.original_module.{name}", None)
    return whole


def _bias_piece(file: Checkpoint, path: str, module: Any) -> Piece:
    part = "linear" if is_linear(module) else "norm"
    return Piece(path, BitFit(), {"bias": difference(file.take(f"{path}.bias"), module.bias)}, part)


def _token_ids(file: Checkpoint, path: str) -> list[int]:
    given = file.config.get("trainable_token_indices") or file.field("token_indices")
    if isinstance(given, dict):
        given = next(ids for name, ids in given.items() if path == name or path.endswith(f".{name}"))
    return list(given)


def token_pieces(model: nn.Module, path: str, rows: Tensor, ids: list[int]) -> list[Piece]:
    """Rows of a table that take the base's place; a tied head follows."""
    table: Any = model.get_submodule(path)
    start = table.weight.detach().float()[ids]
    tensors = {"weight": difference(rows, start), "start": start}
    config = Full(tokens=tuple(ids))
    pieces = [Piece(path, config, tensors, "embedding" if isinstance(table, nn.Embedding) else "linear")]
    head = getattr(model, "get_output_embeddings", lambda: None)()
    if head is not None and head.weight is table.weight and head is not table:
        pieces.append(Piece(next(p for p, m in model.named_modules() if m is head), config, {}, "linear"))
    return pieces

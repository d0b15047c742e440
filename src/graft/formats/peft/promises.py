"""What a PEFT config says that the file holds, beside the tensors of its own kind. Each promise has to be kept.

    bias: all                   every bias of the model          bias: lora_only, ...    the biases of the adapted layers
    modules_to_save             every parameter of these         trainable_token_indices     the rows of these tables

Where modules share a weight, the file may hold it under the name of any of them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from torch import nn

from graft.architectures.walk import base_parameters, base_submodules
from graft.errors import GraftError, did_you_mean
from graft.formats.composing import Piece
from graft.formats.peft.file import PeftFile

INNER = ("", "base_layer.", "original_module.", "modules_to_save.")
"""What PEFT may put between a module's path and the name of its parameter."""


def note_broken_promises(file: PeftFile, model: nn.Module, pieces: Sequence[Piece]) -> None:
    """Note for `finish` every tensor that the config promises and the file lacks. pieces: what was read.

    Raises `GraftError` for trained tokens of a module that the base does not have.
    """
    sharing = _sharing(model)
    for path, parameters in _promised(file, model, pieces):
        for name, parameter in parameters:
            holders = sharing[id(parameter)]
            if not any(_holds(file, *each) for each in holders):
                file.note_missing(f"{path}.{name}")
    for path in _tables(file, model):
        weight: Any = getattr(model.get_submodule(path), "weight", None)
        holders = [each for each, _ in sharing.get(id(weight), [])] or [path]
        if not any(name.startswith(f"{each}.token_adapter.") for each in holders for name in file.kept):
            file.note_missing(f"{path}.token_adapter.trainable_tokens_delta")


def _sharing(model: nn.Module) -> dict[int, list[tuple[str, str]]]:
    """Return, by the id of each parameter, the (module, name) under which the model knows it."""
    found: dict[int, list[tuple[str, str]]] = {}
    for path, module in base_submodules(model):
        for name, parameter in module.named_parameters(recurse=False):
            found.setdefault(id(parameter), []).append((path, name))
    return found


def _holds(file: PeftFile, path: str, name: str) -> bool:
    """Whether the file has a parameter of a module, or of a module in it that was saved as a whole."""
    parts = path.split(".")
    outer = [(".".join(parts[:end]), ".".join([*parts[end:], name])) for end in range(len(parts), 0, -1)]
    return any(f"{each}.{inner}{rest}" in file.kept for each, rest in outer for inner in INNER)


def _promised(
    file: PeftFile, model: nn.Module, pieces: Sequence[Piece]
) -> Iterator[tuple[str, list[tuple[str, nn.Parameter]]]]:
    """Yield (path, parameters) of the modules that the file says it holds, wholly or in part."""
    bias, saved = file.config.get("bias") or "none", tuple(file.config.get("modules_to_save") or ())
    adapted = {piece.path for piece in pieces}
    for path, module in base_submodules(model):
        if saved and path.endswith(saved):
            yield path, list(base_parameters(module))
        own = module._parameters.get("bias")
        if own is not None and (bias == "all" or (bias != "none" and path in adapted)):
            yield path, [("bias", own)]


def _tables(file: PeftFile, model: nn.Module) -> list[str]:
    """Return the paths of the modules with trained tokens. A list of tokens means the input embedding."""
    given = file.config.get("trainable_token_indices") or {}
    paths = [path for path, _ in base_submodules(model)]
    if isinstance(given, dict):
        for name in given:
            if not any(path == name or path.endswith(f".{name}") for path in paths):
                near = did_you_mean(name, {path.rpartition(".")[2] for path in paths})
                raise GraftError(
                    f"{file.folder}: trainable_token_indices names '{name}', which is not in this base.{near}"
                )
        return [path for path in paths if any(path == name or path.endswith(f".{name}") for name in given)]
    table = getattr(model, "get_input_embeddings", lambda: None)()
    return [next(path for path, module in base_submodules(model) if module is table)] if table is not None else []

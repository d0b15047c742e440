"""Adapter folders that other libraries wrote: each format is one file with `detect(folder)` and `read(folder, model)`.

`read` gives a config and the tensors under Graft's own names, so that attaching and strict copying are the same for every format.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from graft.adapters.filling import to_be_filled
from graft.attaching.attach import Model, attach, detach
from graft.attaching.parameters import tensors
from graft.attaching.saving import copy_strictly
from graft.errors import GraftError
from graft.formats import adapterhub, loralib, peft
from graft.formats.llm_adapters import reading as llm_adapters
from graft.formats.own import load_own, read_header
from graft.injection.state import state_of, unwrapped

FORMATS: tuple[Any, ...] = (loralib, llm_adapters, peft, adapterhub)
DEFAULT_NAME = "default"
"""Name of an adapter whose folder does not name it."""


def load(
    model: Model, folder: str | Path, *, name: str | None = None, any_base: bool = False, alpha: float | None = None
) -> Model:
    """Attach the adapter of a folder, in place. Every tensor of the file must have its place and every place its tensor.

    folder: what `graft.save` wrote, a checkpoint that transformers' Trainer or TRL wrote, a folder of PEFT, AdapterHub or LLM-Adapters,
    or a file of loralib. alpha: of a loralib file, which does not say it.
    name: name to attach under (default: the saved one). any_base: accept a base whose weights differ from those it was made for.
    Raises `GraftError` for a missing or damaged file, another base, and missing or extra tensors; the model is then as it was.
    """
    folder = Path(folder)
    header = {} if folder.is_file() else read_header(folder)
    if header.get("format") != "graft":
        return load_foreign(model, folder, name, alpha)
    if alpha is not None:
        raise GraftError(f"alpha is for loralib's files; {folder} says its own")
    return load_own(model, folder, header, name, any_base)


def load_foreign(model: Model, folder: str | Path, name: str | None = None, alpha: float | None = None) -> Model:
    """Attach the adapter of another library's folder (or loralib's file), in place. alpha: of a loralib file, which does not say it.

    Raises `GraftError` for a format or kind that is not known, for missing, unexpected or misshapen tensors (all are listed), and for a
    damaged file; the model is then as it was.
    """
    folder, own_name = Path(folder), name or DEFAULT_NAME
    reader = next((reader for reader in FORMATS if reader.detect(folder)), None)
    if reader is None:
        raise GraftError(
            f"{folder} holds no adapter that Graft can read: its adapter_config.json was not written by graft.save, "
            "LLM-Adapters, PEFT or AdapterHub"
        )
    state = unwrapped(model).__dict__.get("graft_state")
    if state is not None and state.merged is not None:
        raise GraftError(f"adapter '{state.merged}' is merged into the base: call graft.unmerge before loading another")
    if alpha is not None and reader is not loralib:
        raise GraftError(f"alpha is for loralib's files; {folder} says its own")
    config, stored = (
        loralib.read(folder, unwrapped(model), alpha) if reader is loralib else reader.read(folder, unwrapped(model))
    )
    with to_be_filled():
        attach(model, {own_name: config})
    try:
        copy_strictly(stored, dict(tensors(unwrapped(model), state_of(model), own_name)), str(folder))
    except BaseException:
        detach(model, own_name)
        raise
    return model

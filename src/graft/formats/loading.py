"""Load an adapter from disk, whichever library wrote it.

Each foreign format has a `detect(folder)` and a `read(folder, model)`. `read` returns a config and the tensors under Graft's own names, so
attaching and strict copying are the same for every format.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from graft.architectures.two_streams import two_streams_of
from graft.attaching.attach import Model
from graft.attaching.resizing import resized
from graft.errors import GraftError
from graft.formats import adapterhub, loralib, peft
from graft.formats.adapterhub import fusion
from graft.formats.filling import attach_filled
from graft.formats.guarding import named_errors
from graft.formats.llm_adapters import reading as llm_adapters
from graft.formats.own import load_own, read_header
from graft.formats.rows import needed_rows
from graft.injection.state import unwrapped

FORMATS: tuple[Any, ...] = (loralib, llm_adapters, peft, adapterhub)
DEFAULT_NAME = "default"
"""The name under which an adapter is attached when its folder does not name it."""


def load(
    model: Model,
    folder: str | Path,
    *,
    name: str | None = None,
    any_base: bool = False,
    alpha: float | None = None,
    resize: bool = False,
    moved: Mapping[str, str | Path] | None = None,
) -> Model:
    """Attach the adapter that a folder holds, in place. The file's tensors must match the adapter's exactly.

    folder: what `graft.save` wrote, a checkpoint of transformers' Trainer or TRL, a folder of PEFT, AdapterHub or LLM-Adapters, or a
    loralib file. name: the name to attach it under (default: the saved one). any_base: accept a base whose weights differ from those the
    adapter was trained on. alpha: LoRA's alpha, for a loralib file, which does not hold it. resize: give the base's tables the rows that
    an adapter with added tokens needs; new rows that the adapter does not hold are the mean of the others. moved: the new places of
    folders that the adapter refers to (`from`), by the old ones.
    Raises `GraftError` for a missing or damaged file, another base, and missing or extra tensors; the model is then unchanged.
    """
    folder = Path(folder)
    with named_errors(folder), resized(unwrapped(model), needed_rows(unwrapped(model), [folder]) if resize else None):
        if fusion.detect(folder):
            raise GraftError(
                f"{folder} holds an AdapterFusion of AdapterHub, which is made of the adapters beside it: convert them together with "
                "graft import, and load what it writes"
            )
        header = {} if folder.is_file() else read_header(folder)
        if header.get("format") != "graft":
            if moved:
                raise GraftError(f"moved is for adapters that refer to others by `from`; {folder} refers to none")
            return load_foreign(model, folder, name, alpha)
        if alpha is not None:
            raise GraftError(f"alpha is an option for loralib files only; {folder} holds its own")
        return load_own(model, folder, header, name, any_base, moved or {})


def load_foreign(model: Model, folder: str | Path, name: str | None = None, alpha: float | None = None) -> Model:
    """Attach the adapter of another library's folder, or of a loralib file, in place. alpha: LoRA's alpha, for a loralib file.

    Raises `GraftError` for an unknown format or kind, for missing, unexpected or misshapen tensors (all are listed), and for a damaged
    file; the model is then unchanged.
    """
    folder, own_name = Path(folder), name or DEFAULT_NAME
    if (streams := two_streams_of(unwrapped(model))) is not None:
        raise GraftError(
            f"the adapter in {folder} was made for an ordinary base, and this one is reversible ({streams.variant}): leave out "
            "base.reversible"
        )
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
        raise GraftError(f"alpha is an option for loralib files only; {folder} holds its own")
    config, stored = (
        loralib.read(folder, unwrapped(model), alpha) if reader is loralib else reader.read(folder, unwrapped(model))
    )
    attach_filled(model, own_name, config, stored, str(folder))
    return model

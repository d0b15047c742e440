"""Write an attached adapter in another library's format, or in the subset of PEFT's format that a server reads."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from graft.attaching.merge import own_weights, refuse_reversible
from graft.attaching.stored import write_tensors
from graft.errors import GraftError, did_you_mean
from graft.formats.adapterhub.writing import write as write_adapterhub
from graft.formats.folder import Folder, is_shortened, site_adapters
from graft.formats.folder import base_name as base_name_of
from graft.formats.llm_adapters.writing import write as write_llm_adapters
from graft.formats.peft.naming import refuse_misread
from graft.formats.peft.writing import write as write_peft
from graft.formats.servers import by_svd, fitted
from graft.injection.state import State, state_of, unwrapped
from graft.utils.files import explain_write_errors, new_dir, write_json_atomic


@dataclass(frozen=True)
class Format:
    """How to write one library's folders."""

    write: Callable[[nn.Module, State, str], Folder]
    config: str
    """The name of the config file."""
    weights: str
    """The name of the weights file."""
    base: str = "base_model_name_or_path"
    """The config's field that names the base."""


FORMATS: dict[str, Format] = {
    "peft": Format(write_peft, "adapter_config.json", "adapter_model.safetensors"),
    "adapterhub": Format(write_adapterhub, "adapter_config.json", "adapter.safetensors", "model_name"),
    "llm-adapters": Format(write_llm_adapters, "adapter_config.json", "adapter_model.bin"),
}


def export(
    model: nn.Module,
    name: str,
    folder: str | Path,
    *,
    format: str = "peft",
    serving: str | None = None,
    convert: bool = False,
    svd: int | None = None,
    base_name: str | None = None,
) -> list[str]:
    """Write one adapter to a new folder in another library's format. Return notes on what was converted.

    format: peft, adapterhub or llm-adapters. serving: vllm, sglang or tgi; refuse an adapter that this server would not read whole.
    convert: also apply the conversions that are exact (one rank for all layers, zero LoRAs at layers that the server needs too). svd: write
    the adapter's change to each weight as a LoRA of this rank, for kinds that PEFT cannot hold; the notes say how much is lost. base_name:
    what the files call the base, a hub name or a folder. Without it, a folder outside the current one is called by its last part, so that
    files tell nothing of this machine; a note says so.
    Raises `GraftError` for an unknown format, for what the format or server cannot hold (with the reason), and for a folder that is not
    empty.
    """
    if format not in FORMATS:
        raise GraftError(f"unknown format '{format}'.{did_you_mean(format, FORMATS)} There are: {', '.join(FORMATS)}")
    if format != "peft" and (serving or svd is not None or convert):
        raise GraftError(
            f"serving, convert and svd need format peft, which is what servers read; the format is {format}"
        )
    folder, root, state = Path(folder), unwrapped(model), state_of(model)
    refuse_reversible(root, "cannot be written for another library")
    if folder.exists() and any(folder.iterdir()):
        raise GraftError(f"{folder} is not empty: name a new folder")
    # First the folder in memory, which raises for whatever the format or the server cannot hold; nothing is on disk by then.
    kind = FORMATS[format]
    with own_weights(root, state):  # some writers read the base's weights, with which an adapter may be merged
        written = kind.write(root, state, name) if svd is None else by_svd(root, site_adapters(root, state, name), svd)
        if format == "peft" and serving is None:
            refuse_misread(root, written.config)
        if serving is not None:
            written = fitted(root, written, serving, convert=convert)
        _name_base(root, kind, written, base_name)
        tensors = _on_cpu(written.tensors)
        files = {
            file: content if file.endswith(".json") else _on_cpu(content) for file, content in written.files.items()
        }
    # `new_dir` gives the folder its name only when all files are complete.
    with new_dir(folder) as fresh, explain_write_errors(fresh):
        if kind.weights.endswith(".bin"):  # LLM-Adapters reads nothing but a pickle
            torch.save(tensors, fresh / kind.weights)
        else:
            write_tensors(tensors, fresh / kind.weights)
        write_json_atomic(fresh / kind.config, _sorted(written.config))
        for file, content in files.items():
            if file.endswith(".json"):
                write_json_atomic(fresh / file, _sorted(content))
            else:
                write_tensors(content, fresh / file)
    return written.notes


def _name_base(root: nn.Module, kind: Format, written: Folder, name: str | None) -> None:
    """Write the base's name into the config, or note that it is not where PEFT looks for it."""
    if name is not None:
        if kind.base not in written.config:
            raise GraftError(f"this folder does not name its base, so base_name '{name}' has no effect: leave it out")
        written.config[kind.base] = name
    elif kind is FORMATS["peft"] and is_shortened(root):
        written.notes.append(
            f"the files call the base '{base_name_of(root)}' and do not say where it lies on this machine: AutoPeftModel finds "
            "no base under this name. --base-name (base_name= in Python) writes a hub name, or the whole folder"
        )


def _on_cpu(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {key: tensor.detach().to("cpu").contiguous().clone() for key, tensor in tensors.items()}


def _sorted(config: dict[str, Any]) -> dict[str, Any]:
    """Sort the fields, so that the same adapter always gives the same file."""
    return {key: config[key] for key in sorted(config)}

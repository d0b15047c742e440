"""Write an attached adapter in another library's format, or so that a server reads it whole."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from graft.errors import GraftError, did_you_mean
from graft.formats.adapterhub.writing import write as write_adapterhub
from graft.formats.llm_adapters.writing import write as write_llm_adapters
from graft.formats.peft.folder import Folder
from graft.formats.peft.naming import refuse_misread
from graft.formats.peft.writing import held_by
from graft.formats.peft.writing import write as write_peft
from graft.formats.servers import by_svd, fitted
from graft.injection.state import State, state_of, unwrapped
from graft.utils.files import explain_write_errors, new_dir, write_json_atomic


@dataclass(frozen=True)
class Format:
    """How one library's folders are written."""

    write: Callable[[nn.Module, State, str], Folder]
    config: str
    weights: str


FORMATS: dict[str, Format] = {
    "peft": Format(write_peft, "adapter_config.json", "adapter_model.safetensors"),
    "adapterhub": Format(write_adapterhub, "adapter_config.json", "adapter.safetensors"),
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
) -> list[str]:
    """Write one adapter to a new folder in another library's format. Returns notes: what was converted on the way.

    serving: vllm, sglang or tgi: refuse what that server would not read whole. convert: make what can be made exactly (one rank for all
    layers, zero LoRAs where a server wants partners). svd: rank of LoRAs that stand for the adapter's whole difference to each weight, for
    kinds that have no file there; the notes say what is lost.
    Raises `GraftError` for a format that is not known, what the format or server cannot hold (with the reason), and a folder that is not
    empty.
    """
    if format not in FORMATS:
        raise GraftError(f"unknown format '{format}'.{did_you_mean(format, FORMATS)} There are: {', '.join(FORMATS)}")
    if format != "peft" and (serving or svd is not None or convert):
        raise GraftError(f"servers read PEFT's format: serving, convert and svd go with format peft, not {format}")
    folder, root, state = Path(folder), unwrapped(model), state_of(model)
    if folder.exists() and any(folder.iterdir()):
        raise GraftError(f"{folder} is not empty: name a new folder")
    kind = FORMATS[format]
    written = kind.write(root, state, name) if svd is None else by_svd(root, held_by(root, state, name), svd)
    if format == "peft" and serving is None:
        refuse_misread(root, written.config)
    if serving is not None:
        written = fitted(root, written, serving, convert=convert)
    tensors = _on_cpu(written.tensors)
    with new_dir(folder) as fresh, explain_write_errors(fresh):
        if kind.weights.endswith(".bin"):  # a pickle of plain tensors, the only thing that LLM-Adapters reads
            torch.save(tensors, fresh / kind.weights)
        else:
            save_file(tensors, fresh / kind.weights, metadata={"format": "pt"})
        write_json_atomic(fresh / kind.config, _plain(written.config))
        for file, content in written.files.items():
            if file.endswith(".json"):
                write_json_atomic(fresh / file, _plain(content))
            else:
                save_file(_on_cpu(content), fresh / file, metadata={"format": "pt"})
    return written.notes


def _on_cpu(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {key: tensor.detach().to("cpu").contiguous().clone() for key, tensor in tensors.items()}


def _plain(config: dict[str, Any]) -> dict[str, Any]:
    """In a fixed order, so that the same adapter gives the same file."""
    return {key: config[key] for key in sorted(config)}

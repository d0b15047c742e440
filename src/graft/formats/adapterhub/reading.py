"""Read an AdapterHub folder: bottlenecks, Compacter, LoRA, (IA)3, prefix tuning, ReFT, prompt tuning, and unions of these (MAM).

Every tensor of the file is taken exactly once; what is missing or left over is an error that lists it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from graft.adapters.base import AdapterConfig
from graft.errors import GraftError
from graft.formats.adapterhub.bottlenecks import read_bottleneck, shared_rule
from graft.formats.adapterhub.file import HubFile
from graft.formats.adapterhub.heads import head_pieces
from graft.formats.adapterhub.others import read_lora, read_prefix, read_prompt, read_reft
from graft.formats.composing import Piece, composed
from graft.formats.foreign import CONFIG, read_config

READERS: dict[str, Callable[[HubFile, Mapping[str, Any]], list[Piece]]] = {
    "lora": read_lora, "prefix_tuning": read_prefix, "reft": read_reft, "prompt_tuning": read_prompt,
}  # fmt: skip


def detect(folder: str | Path) -> bool:
    """Whether the folder's config is one that AdapterHub writes."""
    if not (Path(folder) / CONFIG).is_file():
        return False
    config = read_config(Path(folder))
    return {"config", "name", "model_type"} <= set(config)


def read(folder: str | Path, model: nn.Module) -> tuple[AdapterConfig, dict[str, Tensor]]:
    """The adapter of a folder for this base: a config, and float32 tensors under Graft's names.

    Raises `GraftError` for a kind that Graft has not, a damaged file, and missing or unexpected tensors (all are listed).
    """
    file = HubFile(Path(folder), read_config(Path(folder)), model)
    whole = file.config["config"]
    pieces = [piece for config in whole.get("configs", [whole]) for piece in _pieces(file, config)]
    pieces += head_pieces(file)
    file.finish()
    return composed(model, pieces)


def _pieces(file: HubFile, config: Mapping[str, Any]) -> list[Piece]:
    kind = config.get("architecture")
    if kind is None and "reduction_factor" in config:
        pieces, shared = read_bottleneck(file, config), shared_rule(file, config)
        return [Piece(p.path, p.config, p.tensors, p.part, shared) for p in pieces] if shared else pieces
    if kind not in READERS:
        raise GraftError(
            f"{file.folder} holds an AdapterHub adapter of kind {kind!r}, which Graft does not read. What can be read: bottlenecks, "
            f"{', '.join(READERS)}"
        )
    return READERS[kind](file, config)

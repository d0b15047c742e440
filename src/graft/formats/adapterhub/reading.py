"""Read an AdapterHub folder: bottlenecks, Compacter, LoRA, (IA)3, prefix tuning, ReFT, prompt tuning, and unions of these (MAM).

Every tensor of the file is taken exactly once; an error lists those that are missing or left over.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from graft.adapters.base import AdapterConfig
from graft.errors import GraftError
from graft.formats.adapterhub.bottlenecks import read_bottleneck, shared_rule
from graft.formats.adapterhub.fields import FIELDS, FolderFields, UnionFields
from graft.formats.adapterhub.file import HubFile
from graft.formats.adapterhub.heads import head_pieces
from graft.formats.adapterhub.invertible import read_invertible
from graft.formats.adapterhub.lora import read_lora
from graft.formats.adapterhub.prompts import read_prefix, read_prompt
from graft.formats.adapterhub.reft import read_reft
from graft.formats.composing import Piece, composed
from graft.formats.fields import known
from graft.formats.foreign import CONFIG, read_config

READERS: dict[str, Callable[[HubFile, Mapping[str, Any]], list[Piece]]] = {
    "lora": read_lora, "prefix_tuning": read_prefix, "reft": read_reft, "prompt_tuning": read_prompt,
}  # fmt: skip


def detect(folder: str | Path) -> bool:
    """Whether AdapterHub wrote the folder's config."""
    if not (Path(folder) / CONFIG).is_file():
        return False
    config = read_config(Path(folder))
    return {"config", "name", "model_type"} <= set(config)


def read(folder: str | Path, model: nn.Module) -> tuple[AdapterConfig, dict[str, Tensor]]:
    """Read a folder's adapter for this base: its config, and float32 tensors under Graft's names.

    Raises `GraftError` for a kind that Graft lacks, a damaged file, and missing or unexpected tensors (all are listed).
    """
    where = str(Path(folder) / CONFIG)
    file = HubFile(Path(folder), known(FolderFields, read_config(Path(folder)), where, "an AdapterHub folder"), model)
    whole = file.config["config"]
    union = known(UnionFields, whole, where, "a union")["configs"] if "configs" in whole else [whole]
    pieces = [piece for config in union for piece in _pieces(file, config, where)]
    pieces += head_pieces(file)
    file.finish()
    return composed(model, pieces)


def _pieces(file: HubFile, config: Mapping[str, Any], where: str) -> list[Piece]:
    kind = config.get("architecture")
    if kind is None and "reduction_factor" in config:
        config = known(FIELDS[None], config, where, "an AdapterHub bottleneck")
        pieces, shared = read_bottleneck(file, config), shared_rule(file, config)
        pieces = [Piece(p.path, p.config, p.tensors, p.part, shared) for p in pieces] if shared else pieces
        return pieces + read_invertible(file, config)
    if kind not in READERS:
        raise GraftError(
            f"{file.folder} holds an AdapterHub adapter of kind {kind!r}, which Graft does not read. It reads: bottlenecks, "
            f"{', '.join(READERS)}"
        )
    return READERS[kind](file, known(FIELDS[kind], config, where, f"AdapterHub's {kind}"))

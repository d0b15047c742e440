"""Read a PEFT folder: `adapter_config.json` and `adapter_model.safetensors` (or .bin).

Every tensor of the file is taken exactly once; an error lists those that are missing or left over.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from torch import Tensor, nn

from graft.adapters.base import AdapterConfig
from graft.formats.composing import Piece, composed
from graft.formats.foreign import CONFIG, read_config
from graft.formats.peft.adalora import read_adalora
from graft.formats.peft.adaption import read_adaption
from graft.formats.peft.file import PeftFile
from graft.formats.peft.hira import read_hira
from graft.formats.peft.ia3 import read_ia3
from graft.formats.peft.lora import read_lora
from graft.formats.peft.miss import read_miss
from graft.formats.peft.oft import read_oft
from graft.formats.peft.promises import note_broken_promises
from graft.formats.peft.prompts import read_prefix, read_prompt
from graft.formats.peft.relatives import read_loha, read_lokr, read_vera
from graft.formats.peft.shira import read_shira
from graft.formats.peft.tables import read_tokens
from graft.formats.peft.wholes import read_norms, read_wholes

READERS: dict[str, Callable[[PeftFile, nn.Module], list[Piece]]] = {
    "LORA": read_lora,
    "IA3": read_ia3,
    "LN_TUNING": read_norms,
    "TRAINABLE_TOKENS": read_tokens,
    "ADALORA": read_adalora,
    "VERA": read_vera,
    "LOHA": read_loha,
    "LOKR": read_lokr,
    "MISS": read_miss,
    "HIRA": read_hira,
    "SHIRA": read_shira,
    "OFT": read_oft,
    "PROMPT_TUNING": read_prompt,
    "P_TUNING": read_prompt,
    "PREFIX_TUNING": read_prefix,
    "ADAPTION_PROMPT": read_adaption,
}


def detect(folder: str | Path) -> bool:
    """Whether the folder's config is one that PEFT writes."""
    return (Path(folder) / CONFIG).is_file() and "peft_type" in read_config(Path(folder))


def read(folder: str | Path, model: nn.Module) -> tuple[AdapterConfig, dict[str, Tensor]]:
    """Read a folder's adapter for this base: its config, and float32 tensors under Graft's names.

    Raises `GraftError` for a kind that Graft lacks, a damaged file, and missing or unexpected tensors (all are listed).
    """
    file = PeftFile(Path(folder), model)
    pieces = READERS[file.kind](file, model) + read_wholes(file, model)
    note_broken_promises(file, model, pieces)
    file.finish()
    return composed(model, pieces)

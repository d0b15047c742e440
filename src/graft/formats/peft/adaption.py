"""PEFT's adaption prompts, read and written: LLaMA-Adapter in the topmost layers, with one gate per layer and no tanh on it.

    <attention>.adaption_prompt [1, P, D]    <attention>.adaption_gate [1]

On LLaMA and Mistral the attention over the prompts goes through the output projection; on GPT-2 it is added after it.

Legend: P virtual tokens, D hidden size.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from graft.adapters.kinds.llama_adapter import LLaMAAdapter
from graft.errors import GraftError
from graft.formats.composing import Piece
from graft.formats.folder import Folder, SiteAdapter
from graft.formats.peft.file import PeftFile
from graft.injection.state import site_table_of

TARGETS = {"llama": "self_attn", "mistral": "self_attn", "gpt2": "attn"}
"""The model types for which PEFT has this kind, and what it calls their attention."""
PROMPT, GATE = ".adaption_prompt", ".adaption_gate"


def _adds(model_type: str) -> Any:
    return "after_o" if model_type == "gpt2" else "before_o"


def read_adaption(file: PeftFile, model: nn.Module) -> list[Piece]:
    """Read one piece for each attention module with prompts."""
    config = LLaMAAdapter(tokens=file.field("adapter_len"), gate="layer", squash="none", adds=_adds(_type_of(model)))
    paths = [name.removesuffix(PROMPT) for name in file.left if name.endswith(PROMPT)]
    if len(paths) != file.field("adapter_layers"):
        raise GraftError(
            f"{file.folder} has prompts for {len(paths)} layers, but its config says {file.field('adapter_layers')}"
        )
    return [
        Piece(path, config, {"prompts": file.take(path + PROMPT).squeeze(0), "gate": file.take(path + GATE)}, "prefix")
        for path in paths
    ]


def write_adaption(root: nn.Module, adapters: Sequence[SiteAdapter], folder: Folder) -> None:
    """Write adaption prompts. Raises `GraftError` for gates, layers and model types that PEFT lacks."""
    model_type, config = _type_of(root), adapters[0].config
    if model_type not in TARGETS:
        raise GraftError(
            f"PEFT has adaption prompts for {', '.join(TARGETS)} only; this base is a {model_type or type(root).__name__}"
        )
    wanted = {"gate": "layer", "squash": "none", "adds": _adds(model_type)}
    if differing := [
        f"{key}: {getattr(config, key)}" for key, value in wanted.items() if getattr(config, key) != value
    ]:
        fixed = ", ".join(f"{key}: {value}" for key, value in wanted.items())
        raise GraftError(
            f"PEFT's adaption prompts on {model_type} compute {fixed}; this adapter has {', '.join(differing)}"
        )
    layers, count = sorted(adapter.installed.site.layer or 0 for adapter in adapters), len(site_table_of(root).blocks)
    if layers != list(range(count - len(layers), count)):
        own = ", ".join(map(str, layers))
        raise GraftError(f"PEFT's adaption prompts are in the topmost layers; this adapter has layers {own} of {count}")
    folder.config |= {"peft_type": "ADAPTION_PROMPT", "adapter_len": config.tokens, "adapter_layers": len(layers),
                      "target_modules": TARGETS[model_type]}  # fmt: skip
    for adapter in adapters:
        folder.tensors[adapter.path + PROMPT] = adapter.module.prompts[None]
        folder.tensors[adapter.path + GATE] = adapter.module.gate


def _type_of(model: nn.Module) -> str:
    return getattr(site_table_of(model).text_config, "model_type", "")

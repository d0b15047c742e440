"""PEFT's adaption prompts: LLaMA-Adapter with one gate per layer that nothing squashes, in the topmost layers.

<attention>.adaption_prompt [1, P, C], <attention>.adaption_gate [1].  On GPT-2 the prompts' attention is added behind the output
projection; on LLaMA and Mistral it goes through it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from graft.adapters.kinds.llama_adapter import LLaMAAdapter
from graft.errors import GraftError
from graft.formats.composing import Piece
from graft.formats.foreign import Checkpoint
from graft.formats.peft.folder import Folder, Held
from graft.injection.state import site_table_of

TARGETS = {"llama": "self_attn", "mistral": "self_attn", "gpt2": "attn"}
"""The families for which PEFT has this kind, and what it calls their attention."""
PROMPT, GATE = ".adaption_prompt", ".adaption_gate"


def _adds(model_type: str) -> Any:
    return "after_o" if model_type == "gpt2" else "before_o"


def read_adaption(file: Checkpoint, model: nn.Module) -> list[Piece]:
    """One piece per attention module that has prompts."""
    config = LLaMAAdapter(tokens=file.field("adapter_len"), gate="layer", squash="none", adds=_adds(_type_of(model)))
    paths = [name.removesuffix(PROMPT) for name in file.left if name.endswith(PROMPT)]
    if len(paths) != file.field("adapter_layers"):
        raise GraftError(
            f"{file.folder} promises prompts in {file.field('adapter_layers')} layers and holds {len(paths)}"
        )
    return [
        Piece(path, config, {"prompts": file.take(path + PROMPT).squeeze(0), "gate": file.take(path + GATE)}, "prefix")
        for path in paths
    ]


def write_adaption(root: nn.Module, installs: Sequence[Held], folder: Folder) -> None:
    """Raises `GraftError` for gates, layers and families that PEFT's kind has not."""
    model_type, config = _type_of(root), installs[0].config
    if model_type not in TARGETS:
        raise GraftError(
            f"PEFT has adaption prompts for {', '.join(TARGETS)} only; this base is a {model_type or type(root).__name__}"
        )
    wanted = {"gate": "layer", "squash": "none", "adds": _adds(model_type)}
    if differing := [
        f"{key}: {getattr(config, key)}" for key, value in wanted.items() if getattr(config, key) != value
    ]:
        said = ", ".join(f"{key}: {value}" for key, value in wanted.items())
        raise GraftError(
            f"PEFT's adaption prompts on {model_type} compute {said}; this adapter has {', '.join(differing)}"
        )
    layers, count = sorted(held.installed.site.layer or 0 for held in installs), len(site_table_of(root).blocks)
    if layers != list(range(count - len(layers), count)):
        own = ", ".join(map(str, layers))
        raise GraftError(f"PEFT's adaption prompts sit in the topmost layers; this adapter has layers {own} of {count}")
    folder.config |= {"peft_type": "ADAPTION_PROMPT", "adapter_len": config.tokens, "adapter_layers": len(layers),
                      "target_modules": TARGETS[model_type]}  # fmt: skip
    for held in installs:
        folder.tensors[held.path + PROMPT] = held.module.prompts[None]
        folder.tensors[held.path + GATE] = held.module.gate


def _type_of(model: nn.Module) -> str:
    return getattr(site_table_of(model).text_config, "model_type", "")

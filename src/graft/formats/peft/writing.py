"""Write an attached adapter as PEFT's `adapter_config.json` and tensors; what PEFT cannot hold is refused with the reason.

One PEFT folder holds one kind (LoRA, IA3, ...) beside whole modules (`modules_to_save`) and token rows.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping

from torch import nn

from graft.adapters.base import AdapterConfig
from graft.errors import GraftError
from graft.formats.peft.adalora import write_adalora
from graft.formats.peft.adaption import write_adaption
from graft.formats.peft.folder import Folder, Held, Writer
from graft.formats.peft.hira import write_hira
from graft.formats.peft.lora_writing import write_lora, write_wholes
from graft.formats.peft.miss import write_miss
from graft.formats.peft.oft import write_oft
from graft.formats.peft.others_writing import write_ia3, write_prefix, write_prompt
from graft.formats.peft.relatives import write_loha, write_lokr, write_vera
from graft.formats.peft.shira import write_shira
from graft.injection.state import State

ROOT = "base_model.model."
COMMON = {"auto_mapping": None, "inference_mode": True, "revision": None, "peft_version": "0.21.2"}
WRITERS: Mapping[str, Writer] = {
    "lora": write_lora,
    "dora": write_lora,
    "ia3": write_ia3,
    "adalora": write_adalora,
    "vera": write_vera,
    "loha": write_loha,
    "lokr": write_lokr,
    "miss": write_miss,
    "hira": write_hira,
    "shira": write_shira,
    "oft": write_oft,
    "prompt": write_prompt,
    "p-tuning": write_prompt,
    "prefix": write_prefix,
    "llama-adapter": write_adaption,
}


def held_by(root: nn.Module, state: State, name: str) -> list[Held]:
    """Every seat of an adapter with its module."""
    return [Held(installed, installed.module) for installed in state.adapter(name).installs]


def write(root: nn.Module, state: State, name: str) -> Folder:
    """An adapter as PEFT stores it. Raises `GraftError` for kinds and combinations that PEFT has no file for."""
    folder = Folder(dict(COMMON))
    by_kind: dict[str, list[Held]] = defaultdict(list)
    for held in held_by(root, state, name):
        by_kind[_family(held.config)].append(held)
    wholes = [*by_kind.pop("full", []), *by_kind.pop("head", [])]
    if len(by_kind) > 1:
        raise GraftError(
            f"one PEFT folder holds one kind, and '{name}' is a stack of {', '.join(sorted(by_kind))}: export its parts on their own, "
            "or keep Graft's format"
        )
    if not by_kind and not wholes:
        raise GraftError(f"adapter '{name}' has nothing to export")
    for kind, installs in by_kind.items():
        if kind not in WRITERS:
            raise GraftError(
                f"PEFT has no kind that computes what '{kind}' does. It can hold: {', '.join(sorted(WRITERS))}"
            )
        WRITERS[kind](root, installs, folder)
    if wholes:
        write_wholes(root, wholes, folder, alone=not by_kind)
    folder.config["base_model_name_or_path"] = getattr(getattr(root, "config", None), "_name_or_path", None) or None
    folder.config["task_type"] = _task_type(root)
    found = {f"{ROOT}{key}": tensor for key, tensor in folder.tensors.items()} | folder.beside
    folder.tensors = {key: tensor.detach() for key, tensor in found.items()}
    return folder


def _family(config: AdapterConfig) -> str:
    return "lora" if config.kind == "pissa" else config.kind


def _task_type(root: nn.Module) -> str | None:
    name = type(root).__name__
    tasks = {"ForSequenceClassification": "SEQ_CLS", "ForConditionalGeneration": "SEQ_2_SEQ_LM",
             "ForCausalLM": "CAUSAL_LM", "LMHeadModel": "CAUSAL_LM", "ForTokenClassification": "TOKEN_CLS"}  # fmt: skip
    return next((task for end, task in tasks.items() if name.endswith(end)), None)

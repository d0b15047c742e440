"""Write an attached adapter in PEFT's format. What PEFT cannot hold is refused, with the reason.

A PEFT folder holds one kind (LoRA, IA3, ...), and with it whole modules (`modules_to_save`) and trained tokens.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping

from torch import nn

from graft.adapters.base import AdapterConfig
from graft.errors import GraftError
from graft.formats.folder import Folder, SiteAdapter, Writer, base_name, site_adapters
from graft.formats.peft.adalora import write_adalora
from graft.formats.peft.adaption import write_adaption
from graft.formats.peft.hira import write_hira
from graft.formats.peft.ia3 import write_ia3
from graft.formats.peft.lora import write_lora
from graft.formats.peft.miss import write_miss
from graft.formats.peft.naming import ROOT
from graft.formats.peft.oft import write_oft
from graft.formats.peft.prompts import write_prefix, write_prompt
from graft.formats.peft.relatives import write_loha, write_lokr, write_vera
from graft.formats.peft.shira import write_shira
from graft.formats.peft.wholes import write_wholes
from graft.injection.state import State

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


def write(root: nn.Module, state: State, name: str) -> Folder:
    """Return the folder that PEFT reads. Raises `GraftError` for kinds and combinations that PEFT cannot hold."""
    folder = Folder(dict(COMMON))
    by_kind: dict[str, list[SiteAdapter]] = defaultdict(list)
    for adapter in site_adapters(root, state, name):
        by_kind[_family(adapter.config)].append(adapter)
    # Wholly trained modules and tokens go with any other kind.
    wholes = [*by_kind.pop("full", []), *by_kind.pop("head", [])]
    if len(by_kind) > 1:
        raise GraftError(
            f"a PEFT folder holds one kind, and '{name}' is a stack of {', '.join(sorted(by_kind))}: export its parts one by one, "
            "or keep Graft's format"
        )
    if not by_kind and not wholes:
        raise GraftError(f"adapter '{name}' has nothing to export")
    for kind, adapters in by_kind.items():
        if kind not in WRITERS:
            raise GraftError(
                f"PEFT has no kind that computes what '{kind}' does. It has equals of: {', '.join(sorted(WRITERS))}"
            )
        WRITERS[kind](root, adapters, folder)
    if wholes:
        write_wholes(root, wholes, folder, alone=not by_kind)
    folder.config["base_model_name_or_path"] = base_name(root)
    folder.config["task_type"] = _task_type(root)
    return folder.with_prefix(ROOT)


def _family(config: AdapterConfig) -> str:
    """Return the kind whose writer takes this config: a PiSSA adapter is written as a LoRA."""
    return "lora" if config.kind == "pissa" else config.kind


def _task_type(root: nn.Module) -> str | None:
    """Return PEFT's name for the model's task, None if the model's class does not tell."""
    name = type(root).__name__
    if name.endswith("ForConditionalGeneration") and not getattr(
        getattr(root, "config", None), "is_encoder_decoder", False
    ):
        return "CAUSAL_LM"  # a language model with towers for images or sound
    tasks = {"ForSequenceClassification": "SEQ_CLS", "ForConditionalGeneration": "SEQ_2_SEQ_LM",
             "ForCausalLM": "CAUSAL_LM", "LMHeadModel": "CAUSAL_LM", "ForTokenClassification": "TOKEN_CLS"}  # fmt: skip
    return next((task for end, task in tasks.items() if name.endswith(end)), None)

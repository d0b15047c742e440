"""Write an attached adapter as LLM-Adapters stores it: LoRA, bottlenecks without biases, prefixes; what it cannot hold is refused.

The tensors' meaning is said in `llm_adapters.py`, which reads them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from graft.errors import GraftError
from graft.formats.llm_adapters.reading import SERIES_POSITIONS
from graft.formats.peft.folder import Folder, Held
from graft.formats.peft.lora_writing import write_lora
from graft.formats.peft.naming import shortest_names
from graft.formats.peft.others_writing import write_prefix
from graft.formats.peft.writing import held_by
from graft.injection.state import State, site_table_of

ROOT = "base_model.model."
KINDS = "lora, series, parallel, prefix"


def write(root: nn.Module, state: State, name: str) -> Folder:
    """An adapter as LLM-Adapters stores it. Raises `GraftError` for kinds, combinations and settings that its files cannot say."""
    installs = held_by(root, state, name)
    kinds = {held.config.kind for held in installs}
    folder = Folder({"base_model_name_or_path": getattr(getattr(root, "config", None), "_name_or_path", None) or None,
                     "inference_mode": True, "task_type": "CAUSAL_LM", "modules_to_save": None, "bias": "none"})  # fmt: skip
    if kinds == {"lora"}:
        _lora(root, installs, folder)
    elif kinds in ({"series"}, {"parallel"}):
        _bottleneck(root, installs, folder, kinds == {"parallel"})
    elif kinds == {"prefix"}:
        _prefix(root, installs, folder)
    else:
        raise GraftError(f"LLM-Adapters holds one of {KINDS} in a folder; '{name}' is {' and '.join(sorted(kinds))}")
    found = {f"{ROOT}{key}": tensor for key, tensor in folder.tensors.items()} | folder.beside
    folder.tensors = {key: tensor.detach() for key, tensor in found.items()}
    return folder


def _lora(root: nn.Module, installs: Sequence[Held], folder: Folder) -> None:
    said = Folder()
    write_lora(root, installs, said)
    config = said.config
    wrong = [what for field, what in {"rank_pattern": "ranks that differ", "alpha_pattern": "alphas that differ",
                                      "use_rslora": "alpha / sqrt(rank)", "lora_bias": "biases"}.items() if config[field]]  # fmt: skip
    wrong += ["LoRA on an embedding"] if any("embedding" in key for key in said.tensors) else []
    if wrong:
        raise GraftError(f"LLM-Adapters' LoRA cannot say {' or '.join(wrong)}: export to PEFT, or keep Graft's format")
    fields = {key: config[key] for key in ("r", "lora_alpha", "lora_dropout", "fan_in_fan_out")}
    folder.config |= {"peft_type": "LORA", "enable_lora": None, "merge_weights": False, **fields,
                      "target_modules": _targets(root, installs)}  # fmt: skip
    folder.tensors |= said.tensors


def _bottleneck(root: nn.Module, installs: Sequence[Held], folder: Folder, beside: bool) -> None:
    config: Any = installs[0].config
    uniform = {held.config.model_copy(update={"sites": "", "position": "after"}).model_dump_json() for held in installs}
    wrong = [what for what, holds in {
        "settings that differ between sites": len(uniform) > 1, "biases": config.biases or config.train_bias,
        "norms": config.norm or config.norm_after, "a factor per channel": config.scale == "channel",
        "sublayers (name linear layers, as mlp.down)": any(held.installed.site.type != "linear" for held in installs),
        "the residual stream": config.reads != "site" or getattr(config, "skip", "site") != "site",
    }.items() if holds]  # fmt: skip
    for held in installs:
        last = held.path.rsplit(".", 1)[-1]
        if not beside and SERIES_POSITIONS.get(last) != held.config.position:
            wrong.append(f"a series adapter {held.config.position} '{last}'")
    if wrong:
        raise GraftError(
            f"LLM-Adapters' bottlenecks cannot say {' or '.join(dict.fromkeys(wrong))}: keep Graft's format"
        )
    folder.config |= {
        "peft_type": "BOTTLENECK", "bottleneck_size": config.bottleneck, "non_linearity": config.activation, "scaling": config.scale,
        "adapter_dropout": config.dropout, "use_parallel_adapter": beside, "use_adapterp": False,
        "init_weights": "mam_adapter" if config.init == "mam" else "bert", "target_modules": _targets(root, installs),
    }  # fmt: skip
    for held in installs:
        own = dict(held.module.f.named_parameters())
        folder.tensors |= {f"{held.path}.adapter_{side}.weight": own[f"{side}.weight"] for side in ("down", "up")}
        if config.scale == "learned":
            folder.tensors[f"{held.path}.adapter_scaling"] = own["scale"]


def _prefix(root: nn.Module, installs: Sequence[Held], folder: Folder) -> None:
    write_prefix(root, installs, folder)
    if (
        getattr(site_table_of(root).text_config, "model_type", None) == "bloom"
    ):  # keys first, then values; a key block [P, H, D] read as [H, D, P]
        keys = torch.stack([held.module.keys_values()[0].detach() for held in installs])
        values = torch.stack([held.module.keys_values()[1].detach() for held in installs])
        layers, tokens, heads, head_dim = keys.shape
        keys = keys.permute(0, 2, 3, 1).reshape(layers, tokens, heads, head_dim)
        folder.beside["prompt_embeddings"] = torch.cat([keys, values]).transpose(0, 1).reshape(tokens, -1)


def _targets(root: nn.Module, installs: Sequence[Held]) -> list[str]:
    """Endings of names, which is how LLM-Adapters matches; whole paths where some layers are left out."""
    paths = [held.path for held in installs]
    names = shortest_names(root, paths)
    return sorted(paths) if "layers_to_transform" in names else names["target_modules"]

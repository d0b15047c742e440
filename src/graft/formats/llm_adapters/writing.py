"""Write an attached adapter in the format of LLM-Adapters: LoRA, bottlenecks without biases, prefixes. All else is refused.

`reading.py` explains the tensors.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from graft.errors import GraftError
from graft.formats.folder import Folder, SiteAdapter, base_name, site_adapters
from graft.formats.llm_adapters.reading import SERIES_POSITIONS
from graft.formats.peft.lora import write_lora
from graft.formats.peft.naming import ROOT, shortest_names
from graft.formats.peft.prompts import write_prefix
from graft.injection.state import State, site_table_of

KINDS = "lora, series, parallel, prefix"


def write(root: nn.Module, state: State, name: str) -> Folder:
    """Return the folder that LLM-Adapters reads. Raises `GraftError` for kinds, combinations and settings that it cannot hold."""
    adapters = site_adapters(root, state, name)
    kinds = {adapter.config.kind for adapter in adapters}
    folder = Folder({"base_model_name_or_path": base_name(root), "inference_mode": True, "task_type": "CAUSAL_LM"})
    if kinds != {"prefix"}:
        folder.config |= {"modules_to_save": None, "bias": "none"}
    if kinds == {"lora"}:
        _lora(root, adapters, folder)
    elif kinds in ({"series"}, {"parallel"}):
        _bottleneck(root, adapters, folder, kinds == {"parallel"})
    elif kinds == {"prefix"}:
        _prefix(root, adapters, folder)
    else:
        raise GraftError(f"a folder of LLM-Adapters holds one of {KINDS}; '{name}' is {' and '.join(sorted(kinds))}")
    return folder.with_prefix(ROOT)


def _lora(root: nn.Module, adapters: Sequence[SiteAdapter], folder: Folder) -> None:
    # LLM-Adapters is a fork of an older PEFT, so its LoRA is a subset of PEFT's.
    written = Folder()
    write_lora(root, adapters, written)
    config = written.config
    wrong = [what for field, what in {"rank_pattern": "ranks that differ", "alpha_pattern": "alphas that differ",
                                      "use_rslora": "alpha / sqrt(rank)", "lora_bias": "biases"}.items() if config[field]]  # fmt: skip
    wrong += ["LoRA on an embedding"] if any("embedding" in key for key in written.tensors) else []
    if wrong:
        raise GraftError(f"LLM-Adapters' LoRA cannot hold {' or '.join(wrong)}: export to PEFT, or keep Graft's format")
    fields = {key: config[key] for key in ("r", "lora_alpha", "lora_dropout", "fan_in_fan_out")}
    folder.config |= {"peft_type": "LORA", "enable_lora": None, "merge_weights": False, **fields,
                      "target_modules": _targets(root, adapters)}  # fmt: skip
    folder.tensors |= written.tensors


def _bottleneck(root: nn.Module, adapters: Sequence[SiteAdapter], folder: Folder, parallel: bool) -> None:
    config: Any = adapters[0].config
    settings = {
        adapter.config.model_copy(update={"sites": "", "position": "after"}).model_dump_json() for adapter in adapters
    }
    wrong = [what for what, holds in {
        "settings that differ between sites": len(settings) > 1, "biases": config.biases or config.train_bias,
        "hidden_dropout": config.hidden_dropout > 0.0,
        "norms": config.norm or config.norm_after, "a factor per channel": config.scale == "channel",
        "sublayers (name linear layers, as mlp.down)": any(adapter.installed.site.type != "linear" for adapter in adapters),
        "the residual stream": config.reads != "site" or getattr(config, "skip", "site") != "site",
    }.items() if holds]  # fmt: skip
    for adapter in adapters:
        last = adapter.path.rsplit(".", 1)[-1]
        if not parallel and SERIES_POSITIONS.get(last) != adapter.config.position:
            wrong.append(f"a series adapter {adapter.config.position} '{last}'")
    if wrong:
        raise GraftError(
            f"LLM-Adapters' bottlenecks cannot hold {' or '.join(dict.fromkeys(wrong))}: keep Graft's format"
        )
    folder.config |= {
        "peft_type": "BOTTLENECK", "bottleneck_size": config.bottleneck, "non_linearity": config.activation, "scaling": config.scale,
        "adapter_dropout": config.dropout, "use_parallel_adapter": parallel, "use_adapterp": False,
        "init_weights": "mam_adapter" if config.init == "mam" else "bert", "target_modules": _targets(root, adapters),
    }  # fmt: skip
    for adapter in adapters:
        own = dict(adapter.module.f.named_parameters())
        folder.tensors |= {f"{adapter.path}.adapter_{side}.weight": own[f"{side}.weight"] for side in ("down", "up")}
        if config.scale == "learned":
            folder.tensors[f"{adapter.path}.adapter_scaling"] = own["scale"]


def _prefix(root: nn.Module, adapters: Sequence[SiteAdapter], folder: Folder) -> None:
    write_prefix(root, adapters, folder)
    if getattr(site_table_of(root).text_config, "model_type", None) == "bloom":
        # All keys come first, then all values, and the memory of a key block [P, H, D] is read as [H, D, P].
        keys = torch.stack([adapter.module.keys_values()[0].detach() for adapter in adapters])
        values = torch.stack([adapter.module.keys_values()[1].detach() for adapter in adapters])
        layers, tokens, heads, head_dim = keys.shape
        keys = keys.permute(0, 2, 3, 1).reshape(layers, tokens, heads, head_dim)
        folder.unprefixed["prompt_embeddings"] = torch.cat([keys, values]).transpose(0, 1).reshape(tokens, -1)


def _targets(root: nn.Module, adapters: Sequence[SiteAdapter]) -> list[str]:
    """Return endings of names, which is what LLM-Adapters matches, or whole paths if only some layers are adapted."""
    paths = [adapter.path for adapter in adapters]
    names = shortest_names(root, paths)
    return sorted(paths) if "layers_to_transform" in names else names["target_modules"]

"""The shortest `target_modules` that PEFT (and the servers that read its files) takes for exactly these modules."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from graft.errors import GraftError
from graft.formats.peft.targets import matches

EXPERT_NAMES = {"mixtral": ("gate", "w1", "w2", "w3"), "qwen2_moe": ("gate", "gate_proj", "up_proj", "down_proj")}
"""Ends of module names that PEFT 0.21 takes for a model's experts and router, by the layout that transformers converts the model's
checkpoints from. It does so for every module of that name: of dense layers and shared experts too."""


def shortest_names(root: nn.Module, paths: Sequence[str]) -> dict[str, Any]:
    """`target_modules`, and where only some layers have the modules `layers_to_transform` and its pattern.

    Endings of one or two names where they say exactly these modules, else whole paths.
    """
    wanted = set(paths)
    every = [path for path, module in root.named_modules() if path and "graft" not in path.split(".")]
    for length in (1, 2):
        endings = sorted({".".join(path.split(".")[-length:]) for path in wanted})
        said = {path for path in every if matches(path, endings)}
        if said == wanted:
            return {"target_modules": endings}
        numbers = {path: re.match(r"(?:.*\.)?([^.]+)\.(\d+)\.", path) for path in said}
        if not all(numbers.values()):
            continue
        lists = {match[1] for match in numbers.values() if match}
        layers = sorted({int(match[2]) for path, match in numbers.items() if match and path in wanted})
        chosen = {path for path, match in numbers.items() if match and int(match[2]) in layers}
        if chosen == wanted and len(lists) == 1:
            return {"target_modules": endings, "layers_to_transform": layers, "layers_pattern": lists.pop()}
    return {"target_modules": sorted(wanted)}


def patterns(values: Mapping[str, float]) -> tuple[float | int, dict[str, float | int]]:
    """The most frequent of the values by module path, and the others as a pattern that PEFT matches with each module alone."""
    whole = {path: int(value) if float(value).is_integer() else value for path, value in values.items()}
    listed = list(whole.values())
    usual = max(dict.fromkeys(listed), key=listed.count)
    return usual, {"^" + path.replace(".", r"\."): value for path, value in whole.items() if value != usual}


def refuse_misread(root: nn.Module, config: Mapping[str, Any]) -> None:
    """Raise `GraftError` for target modules that PEFT would rename to a model's experts, and so leave out."""
    from transformers import conversion_mapping

    kind = str(getattr(getattr(root, "config", None), "model_type", None))
    layouts: dict[str, str] = getattr(conversion_mapping, "_MODEL_TO_CONVERSION_PATTERN", {})
    ends = EXPERT_NAMES.get(layouts.get(kind, ""), ())
    wrong = sorted({name.rpartition(".")[2] for name in config.get("target_modules") or ()} & set(ends))
    if wrong and config.get("peft_type") == "LORA":
        raise GraftError(
            f"PEFT takes {', '.join(repr(name) for name in wrong)} of {kind} for the experts, and would leave these layers as they are: "
            "adapt other sites, keep Graft's format, or say which server the folder is for"
        )

"""How PEFT's configs name modules: the shortest `target_modules` that match exactly the given ones, in PEFT and in servers."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from graft.architectures.walk import base_submodules
from graft.errors import GraftError
from graft.formats.peft.targets import matches

ROOT = "base_model.model."
"""What PEFT puts before the names of the base's modules."""
EXPERT_NAMES = {"mixtral": ("gate", "w1", "w2", "w3"), "qwen2_moe": ("gate", "gate_proj", "up_proj", "down_proj")}
"""Last parts of module names that PEFT 0.21 takes for a model's router and experts, by the weight layout that transformers converts that
model's files from. PEFT does so wherever the name occurs, in dense layers and shared experts too."""


def shortest_names(root: nn.Module, paths: Sequence[str]) -> dict[str, Any]:
    """Return `target_modules`, and `layers_to_transform` with its pattern if only some layers are adapted.

    Endings of one name (`q_proj`) or two (`self_attn.q_proj`) are used if they match exactly these modules, else whole paths.
    """
    wanted = set(paths)
    every = [path for path, _ in base_submodules(root)]
    for length in (1, 2):
        endings = sorted({".".join(path.split(".")[-length:]) for path in wanted})
        matched = {path for path in every if matches(path, endings)}
        if matched == wanted:
            return {"target_modules": endings}
        # The endings match too much; perhaps the layers' numbers tell: `model.layers.3.self_attn.q_proj` is layer 3 of the list `layers`.
        numbers = {path: re.match(r"(?:.*\.)?([^.]+)\.(\d+)\.", path) for path in matched}
        if not all(numbers.values()):
            continue
        lists = {match[1] for match in numbers.values() if match}
        layers = sorted({int(match[2]) for path, match in numbers.items() if match and path in wanted})
        chosen = {path for path, match in numbers.items() if match and int(match[2]) in layers}
        if chosen == wanted and len(lists) == 1:
            return {"target_modules": endings, "layers_to_transform": layers, "layers_pattern": lists.pop()}
    return {"target_modules": sorted(wanted)}


def patterns(values: Mapping[str, float]) -> tuple[float | int, dict[str, float | int]]:
    """Return the most frequent value, and the exceptions as patterns that match one module each. values: by module path."""
    whole = {path: int(value) if float(value).is_integer() else value for path, value in values.items()}
    listed = list(whole.values())
    usual = max(dict.fromkeys(listed), key=listed.count)
    return usual, {"^" + path.replace(".", r"\."): value for path, value in whole.items() if value != usual}


def refuse_misread(root: nn.Module, config: Mapping[str, Any]) -> None:
    """Raise `GraftError` for target modules that PEFT would take for a model's experts, and so leave out."""
    from transformers import conversion_mapping

    kind = str(getattr(getattr(root, "config", None), "model_type", None))
    layouts: dict[str, str] = getattr(conversion_mapping, "_MODEL_TO_CONVERSION_PATTERN", {})
    ends = EXPERT_NAMES.get(layouts.get(kind, ""), ())
    wrong = sorted({name.rpartition(".")[2] for name in config.get("target_modules") or ()} & set(ends))
    if wrong and config.get("peft_type") == "LORA":
        raise GraftError(
            f"PEFT takes {', '.join(repr(name) for name in wrong)} of {kind} for its experts, and would not adapt these layers: "
            "adapt other sites, keep Graft's format, or say which server the folder is for"
        )

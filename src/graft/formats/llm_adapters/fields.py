"""The fields of LLM-Adapters' configs by kind, and how its configs are told from those of PEFT, from an early version of which it was made.

Its LoRA has `enable_lora` and `merge_weights`, which PEFT dropped, and its bottlenecks are its own. Its prompts and prefixes have exactly
the fields that PEFT had then, all of them in every file.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from graft.formats.fields import Fields, Ignored


class Common(Fields):
    """Of every kind."""

    peft_type: str
    base_model_name_or_path: Ignored = None
    inference_mode: Ignored = False
    task_type: Ignored = None


class AtModules(Common):
    """Of kinds that are attached to modules."""

    target_modules: list[str] | str | None = None
    modules_to_save: list[str] | None = None
    bias: Literal["none", "all", "lora_only", "adapter_only"] | None = "none"


class LoRAFields(AtModules):
    r: int = 8
    lora_alpha: float
    lora_dropout: float | None = 0.0
    enable_lora: list[bool] | None = None
    merge_weights: Ignored = False
    fan_in_fan_out: Ignored = False


class BottleneckFields(AtModules):
    bottleneck_size: int = 256
    non_linearity: str = "tanh"
    scaling: float | Literal["learned"] = 1.0
    adapter_dropout: float | None = 0.0
    use_parallel_adapter: bool | None = False
    use_adapterp: Ignored = False
    init_weights: Ignored = "bert"


class VirtualTokens(Common):
    """Of prompts and prefixes."""

    num_virtual_tokens: int
    num_transformer_submodules: Ignored = None
    num_attention_heads: Ignored = None
    num_layers: Ignored = None
    token_dim: Ignored = None


class PromptFields(VirtualTokens):
    prompt_tuning_init: Ignored = None
    prompt_tuning_init_text: Ignored = None
    tokenizer_name_or_path: Ignored = None


class PTuningFields(VirtualTokens):
    encoder_reparameterization_type: Ignored = None
    encoder_hidden_size: Ignored = None
    encoder_num_layers: Ignored = None
    encoder_dropout: Ignored = None


class PrefixFields(VirtualTokens):
    encoder_hidden_size: Ignored = None
    prefix_projection: Ignored = False


FIELDS: dict[str, type[Fields]] = {
    "LORA": LoRAFields, "BOTTLENECK": BottleneckFields, "PREFIX_TUNING": PrefixFields, "PROMPT_TUNING": PromptFields,
    "P_TUNING": PTuningFields,
}  # fmt: skip
LATER_KEYS = {"auto_mapping", "revision", "peft_version"}
"""Keys of PEFT's configs that this fork lacks."""


def written_by_llm_adapters(config: Mapping[str, Any]) -> bool:
    """Whether a config has the keys by which LLM-Adapters' are known."""
    kind, keys = config.get("peft_type"), set(config)
    if keys & LATER_KEYS or not isinstance(kind, str):
        return False
    if kind == "LORA":
        return bool(keys & {"enable_lora", "merge_weights"})
    return kind == "BOTTLENECK" or kind in FIELDS and keys == set(FIELDS[kind].model_fields)

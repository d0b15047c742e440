"""The fields of PEFT's configs by kind, with PEFT's own defaults."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field

from graft.formats.fields import Fields, Ignored, Unused

Names = list[str] | str | None
Biases = Annotated[str, Field(pattern=r"^(none|all|\w+_only)$")]
"""Which biases of the base were trained too: none, all, or those of the adapted layers."""


class Common(Fields):
    """Of every kind."""

    peft_type: str
    task_type: str | None = None
    peft_version: str | None = None
    auto_mapping: Ignored = None
    base_model_name_or_path: Ignored = None
    revision: Ignored = None
    inference_mode: Ignored = False
    runtime_config: Ignored = None


class AtModules(Common):
    """Of kinds that are attached to modules."""

    target_modules: Names = None
    modules_to_save: list[str] | None = None


class InLayers(AtModules):
    """Of kinds that may leave out layers."""

    exclude_modules: Names = None
    layers_to_transform: list[int] | int | None = None
    layers_pattern: Names = None


class LoRAFields(InLayers):
    r: int = 8
    lora_alpha: float = 8.0
    lora_dropout: float | None = 0.0
    bias: Biases | None = "none"
    use_rslora: bool | None = False
    use_dora: bool | None = False
    lora_bias: bool | None = False
    rank_pattern: dict[str, int] | None = None
    alpha_pattern: dict[str, float] | None = None
    target_parameters: list[str] | None = None
    trainable_token_indices: list[int] | dict[str, list[int]] | None = None
    ensure_weight_tying: bool | None = False
    init_lora_weights: bool | str | None = True
    fan_in_fan_out: Ignored = False
    loftq_config: Ignored = None
    eva_config: Ignored = None
    corda_config: Ignored = None
    lora_ga_config: Ignored = None
    megatron_core: Ignored = None
    qalora_group_size: Ignored = None
    merge_weights: Ignored = False
    enable_lora: Unused = None
    megatron_config: Unused = None
    layer_replication: Unused = None
    use_qalora: Unused = False
    use_bdlora: Unused = None
    alora_invocation_tokens: Unused = None
    arrow_config: Unused = None
    kasa_config: Unused = None
    monteclora_config: Unused = None
    velora_config: Unused = None


class AdaLoRAFields(LoRAFields):
    """PEFT inherits LoRA's fields, and its AdaLoRA does not look at most of them."""

    init_r: int = 12
    rank_pattern: dict[str, list[bool]] | None = None  # pyright: ignore[reportIncompatibleVariableOverride]
    beta1: float | None = 0.85
    beta2: float | None = 0.85
    orth_reg_weight: float | None = 0.5
    r: Ignored = 8
    use_rslora: Ignored = False
    alpha_pattern: Ignored = None
    lora_bias: Ignored = False
    init_lora_weights: Ignored = True
    target_r: Ignored = None
    tinit: Ignored = None
    tfinal: Ignored = None
    deltaT: Ignored = None
    total_step: Ignored = None
    use_dora: Unused = False
    target_parameters: Unused = None


class IA3Fields(AtModules):
    exclude_modules: Names = None
    feedforward_modules: Names = None
    fan_in_fan_out: Ignored = False
    init_ia3_weights: Ignored = True


class NormFields(AtModules):
    exclude_modules: Names = None


class TokenFields(Common):
    target_modules: Names = None
    token_indices: list[int]
    init_weights: Ignored = True


class VeRAFields(AtModules):
    r: int = 256
    projection_prng_key: int | None = 0
    save_projection: bool | None = True
    vera_dropout: float | None = 0.0
    d_initial: float | None = 0.1
    bias: Biases | None = "none"
    layers_to_transform: list[int] | int | None = None
    layers_pattern: Names = None
    fan_in_fan_out: Ignored = False
    init_weights: Ignored = True


class LoHaFields(InLayers):
    r: int = 8
    alpha: float = 8.0
    rank_pattern: dict[str, int] | None = None
    alpha_pattern: dict[str, float] | None = None
    rank_dropout: float | None = 0.0
    module_dropout: float | None = 0.0
    use_effective_conv2d: Ignored = False
    init_weights: Ignored = True


class LoKrFields(LoHaFields):
    decompose_both: bool | None = False
    decompose_factor: int | None = -1
    rank_dropout_scale: Ignored = False


class MiSSFields(InLayers):
    r: int = 64
    mini_r: int | None = 1
    miss_dropout: float | None = 0.0
    bias: Biases | None = "none"
    init_weights: bool | str | None = True


class HiRAFields(InLayers):
    r: int = 32
    hira_dropout: float | None = 0.0
    rank_pattern: dict[str, int] | None = None
    fan_in_fan_out: Ignored = False
    init_weights: Ignored = True


class SHiRAFields(AtModules):
    r: int = 32
    random_seed: int | None = None
    mask_type: Ignored = "random"
    fan_in_fan_out: Ignored = False
    init_weights: Ignored = True


class OFTFields(InLayers):
    r: int | None = 0
    oft_block_size: int | None = 32
    module_dropout: float | None = 0.0
    bias: Biases | None = "none"
    coft: bool | None = False
    eps: float | None = 6e-5
    block_share: bool | None = False
    use_cayley_neumann: bool | None = True
    num_cayley_neumann_terms: int | None = 5
    fan_in_fan_out: Ignored = False
    init_weights: Ignored = True


class PromptFields(Common):
    num_virtual_tokens: int
    modules_to_save: list[str] | None = None
    num_transformer_submodules: int | None = None
    token_dim: Ignored = None
    num_attention_heads: Ignored = None
    num_layers: Ignored = None
    prompt_tuning_init: Ignored = None
    prompt_tuning_init_text: Ignored = None
    tokenizer_name_or_path: Ignored = None
    tokenizer_kwargs: Ignored = None


class PTuningFields(PromptFields):
    encoder_reparameterization_type: Ignored = None
    encoder_hidden_size: Ignored = None
    encoder_num_layers: Ignored = None
    encoder_dropout: Ignored = None


class PrefixFields(PromptFields):
    encoder_hidden_size: Ignored = None
    prefix_projection: Ignored = False
    postprocess_past_key_value_function: Ignored = None
    init_weights: Ignored = None


class AdaptionFields(Common):
    adapter_len: int
    adapter_layers: int
    target_modules: Ignored = None


FIELDS: dict[str, type[Any]] = {
    "LORA": LoRAFields, "ADALORA": AdaLoRAFields, "IA3": IA3Fields, "LN_TUNING": NormFields, "TRAINABLE_TOKENS": TokenFields,
    "VERA": VeRAFields, "LOHA": LoHaFields, "LOKR": LoKrFields, "MISS": MiSSFields, "HIRA": HiRAFields, "SHIRA": SHiRAFields,
    "OFT": OFTFields, "PROMPT_TUNING": PromptFields, "P_TUNING": PTuningFields, "PREFIX_TUNING": PrefixFields,
    "ADAPTION_PROMPT": AdaptionFields,
}  # fmt: skip

"""The fields of AdapterHub's configs by architecture, with the library's own defaults."""

from __future__ import annotations

from typing import Literal

from graft.formats.fields import Fields, Ignored, Unused


class FolderFields(Fields):
    """Of a folder: whose adapter it is, and the config of the adapter itself."""

    config: dict[str, object]
    name: str
    model_type: Ignored
    model_class: str | None = None
    model_name: Ignored = None
    hidden_size: Ignored = None
    version: Ignored = None
    config_id: Ignored = None
    type: Ignored = None


class UnionFields(Fields):
    architecture: Ignored = None
    configs: list[dict[str, object]]


class BottleneckFields(Fields):
    """Of bottlenecks and Compacter."""

    mh_adapter: bool
    output_adapter: bool
    reduction_factor: Ignored
    non_linearity: str
    architecture: Ignored = None
    cross_adapter: bool | None = False
    original_ln_before: bool | None = False
    original_ln_after: bool | None = True
    ln_before: bool | None = False
    ln_after: bool | None = False
    is_parallel: bool | None = False
    scaling: float | Literal["learned", "channel"] = 1.0
    residual_before_ln: bool | None = True
    adapter_residual_before_ln: bool | None = False
    leave_out: list[int] | None = None
    dropout: float | None = 0.0
    stochastic_depth: Unused = 0.0
    init_weights: Ignored = "bert"
    init_weights_seed: Ignored = None
    inv_adapter: str | None = None
    inv_adapter_reduction_factor: Ignored = None
    use_gating: bool | None = False
    phm_layer: bool | None = False
    phm_dim: int = 4
    phm_rank: int = 1
    phm_bias: bool = True
    phm_init_range: float = 0.0001
    factorized_phm_W: bool = True
    factorized_phm_rule: bool = False
    shared_phm_rule: bool = True
    shared_W_phm: bool | None = False
    phm_c_init: Ignored = None
    learn_phm: Ignored = True
    hypercomplex_nonlinearity: Ignored = None


class LoRAFields(Fields):
    """Of LoRA, DoRA, VeRA and (IA)3."""

    architecture: Ignored = "lora"
    selfattn_lora: bool = True
    intermediate_lora: bool = False
    output_lora: bool = False
    attn_matrices: list[Literal["q", "k", "v"]] = ["q", "v"]
    leave_out: list[int] | None = None
    r: int = 8
    alpha: float = 8.0
    dropout: float | None = 0.0
    composition_mode: Literal["add", "scale"] = "add"
    use_gating: bool | None = False
    use_dora: bool | None = False
    vera_d: float | None = None
    vera_b: float | None = None
    init_weights: Ignored = None
    init_weights_seed: Ignored = None
    dtype: Ignored = None


class PrefixFields(Fields):
    architecture: Ignored = "prefix_tuning"
    prefix_length: int = 30
    encoder_prefix: bool | None = True
    cross_prefix: bool | None = True
    leave_out: list[int] | None = None
    non_linearity: Literal["tanh"] | None = "tanh"
    use_gating: bool | None = False
    dropout: Unused = 0.0
    shared_gating: bool | None = True
    flat: Ignored = False
    bottleneck_size: Ignored = 512
    init_weights_seed: Ignored = None


class ReFTFields(Fields):
    architecture: Ignored = "reft"
    layers: Literal["all"] | list[int]
    prefix_positions: int
    suffix_positions: int
    r: int
    orthogonality: bool
    tied_weights: bool = False
    subtract_projection: bool | None = None
    dropout: float | None = 0.0
    non_linearity: str | None = None
    output_reft: Literal[True] | None = True
    init_weights_seed: Ignored = None
    dtype: Ignored = None


class PromptFields(Fields):
    architecture: Ignored = "prompt_tuning"
    prompt_length: int = 10
    combine: str = "prefix"
    prompt_init: Ignored = None
    prompt_init_text: Ignored = None
    random_uniform_scale: Ignored = None
    init_weights_seed: Ignored = None


FIELDS: dict[str | None, type[Fields]] = {
    None: BottleneckFields, "lora": LoRAFields, "prefix_tuning": PrefixFields, "reft": ReFTFields, "prompt_tuning": PromptFields,
}  # fmt: skip
"""By `architecture`, which bottlenecks do not write."""

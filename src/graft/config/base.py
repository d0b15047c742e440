"""The block `base`: the model that adapters are attached to."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, field_validator, model_validator

from graft.config.section import Place, Section

ANCHOR_EVERY = 3
"""The default of `base.anchor_every`."""
DTYPES = Literal["auto", "float32", "bfloat16"]
FewBits = Literal["nf4", "fp4", "int8"]


def _names(value: Any) -> Any:
    """Names in one text, as `sites` of an adapter may have them."""
    if not isinstance(value, str):
        return value
    return (value,) if value.startswith("re:") else tuple(value.split())


class BaseConfig(Section):
    """The frozen model that adapters are grafted onto."""

    model: Place
    """Folder or hub name of a transformers model that suits data.task; "seedling" is the small base that comes with Graft."""
    tokenizer: Place | None = None
    """Folder or hub name of another tokenizer; null is the model's own. An adapter's folder may hold one with added tokens."""
    new_tokens: Annotated[tuple[str, ...], Field(strict=False)] = ()
    """Tokens to add to the tokenizer, such as "<tool>". The base's tables get a row for each, which the adapter trains and holds."""
    resize: Literal["off", "auto"] = "off"
    """auto gives the base's tables the rows that the tokenizer and the adapters need, for adapters with added tokens of other libraries;
    off leaves them as they are. Tokens of new_tokens get rows in any case."""
    revision: str | None = None
    """Branch, tag or commit on the hub; null is the default branch."""
    dtype: DTYPES = "auto"
    """Number format of the base's weights and of the computation; auto is bfloat16 on a GPU that supports it, else float32."""
    quantize: FewBits | None = None
    """Hold the weights of linear layers in 4 bits (nf4, the levels of QLoRA; fp4) or 8 bits (int8), with bitsandbytes; null keeps them in
    `dtype`. They are quantised while the base is loaded; adapters, tables, norms and the head stay in `dtype`."""
    double_quant: bool | None = None
    """Whether the scales of 4-bit weights are quantised too, which saves 0.37 bits per parameter; null is true."""
    compute: Literal["float32", "bfloat16"] | None = None
    """Number format in which 4-bit layers compute; null is `dtype`."""
    skip: Annotated[tuple[str, ...] | None, Field(strict=False), BeforeValidator(_names)] = None
    """Layers that are not quantised: names of sites such as head or mlp.down@0-3, or paths of modules. null is the output head. A head that
    shares the embedding's weight, and a classifier's head, are never quantised."""
    device: str = "auto"
    """auto, cpu, mps, cuda or cuda:N; auto is the first GPU, else the CPU."""
    offload: Literal["host"] | None = None
    """host: keep the frozen weights of the blocks in the host's memory. A block comes to the device for its forward and its backward pass,
    while the next one is copied, so that a base trains that is larger than the device. On a CPU the weights stay in the number format of
    their files until their block runs. null keeps all weights on the device."""
    attention: Literal["auto", "sdpa", "eager", "flash_attention_2"] = "auto"
    """Attention backend; auto leaves the choice to transformers."""
    head: Literal["auto", "fresh"] = "auto"
    """For classification and regression: auto keeps the base's own head, or initialises one if there is none; fresh always initialises
    a new one, for any number of classes. A new head is trained with the adapter and saved with it."""
    dropout: bool = False
    """Whether the base's own dropout is active in training."""
    reversible: Literal["meft1", "meft2", "meft3"] | None = None
    """Couple the blocks into a reversible stack (MEFT), which keeps almost no activations for the backward pass; null leaves them as they
    are. meft1 and meft2 have a site `stream` for the adapter beside each block, meft3 couples attention and MLP."""
    anchor_every: Annotated[int, Field(ge=1)] | None = ANCHOR_EVERY
    """On a reversible base: both streams are kept before every so many blocks; null keeps those after the last block alone. More anchors
    take more memory and give more exact gradients."""
    trust_remote_code: bool = False
    """Whether code from a hub repository may run on this machine."""

    @field_validator("device")
    @classmethod
    def _device_is_known(cls, value: str) -> str:
        if not re.fullmatch(r"auto|cpu|mps|cuda(:\d+)?", value):
            raise ValueError("must be auto, cpu, mps, cuda or cuda:N")
        return value

    @model_validator(mode="after")
    def _settings_of_quantisation_have_an_effect(self) -> BaseConfig:
        for name in ("double_quant", "compute", "skip"):
            if getattr(self, name) is None:
                continue
            if self.quantize is None:
                raise ValueError(
                    f"{name} has no effect without base.quantize (nf4, fp4 or int8): remove it, or set base.quantize"
                )
            if self.quantize == "int8" and name != "skip":
                raise ValueError(
                    f"{name} has no effect with base.quantize: int8, which has no 4-bit weights: remove it"
                )
        return self

    @model_validator(mode="after")
    def _offload_goes_with_the_rest(self) -> BaseConfig:
        if self.offload is not None and self.reversible is not None:
            raise ValueError("offload does not go with base.reversible: remove one of them")
        if self.offload is not None and self.quantize not in (None, "nf4"):
            raise ValueError(f"offload takes a base in full precision or nf4, not base.quantize: {self.quantize}")
        return self

    @model_validator(mode="after")
    def _anchors_are_of_a_reversible_base(self) -> BaseConfig:
        if self.reversible is None and self.anchor_every != ANCHOR_EVERY:
            raise ValueError("anchor_every has no effect without base.reversible: set it, or leave anchor_every out")
        return self

"""The block `base` of a run's YAML."""

from __future__ import annotations

import re
from typing import Literal

from pydantic import Field, field_validator

from graft.config.section import Section

DTYPES = Literal["auto", "float32", "bfloat16"]


class BaseConfig(Section):
    """The frozen model that adapters are grafted onto."""

    model: str = Field(min_length=1)
    """Folder or hub name of a transformers model that data.task goes with; "seedling" is the small base that Graft brings."""
    revision: str | None = None
    """Branch, tag or commit on the hub; null is the default branch."""
    dtype: DTYPES = "auto"
    """Number format of the base's weights and the computation; auto is bfloat16 on a GPU that has it, else float32."""
    device: str = "auto"
    """auto, cpu, mps, cuda or cuda:N; auto is the first GPU, else the CPU."""
    attention: Literal["auto", "sdpa", "eager", "flash_attention_2"] = "auto"
    """Attention backend; auto is what transformers chooses for the model."""
    head: Literal["auto", "fresh"] = "auto"
    """Of classification and regression: auto keeps the head that the base brings and draws one where it brings none; fresh draws one in any
    case, for any number of classes. A drawn head trains with the adapter and is saved with it."""
    dropout: bool = False
    """Whether the base's own dropout is on in training."""
    trust_remote_code: bool = False
    """Whether code that a hub repository brings along may run on this machine."""

    @field_validator("device")
    @classmethod
    def _device_is_known(cls, value: str) -> str:
        if not re.fullmatch(r"auto|cpu|mps|cuda(:\d+)?", value):
            raise ValueError("must be auto, cpu, mps, cuda or cuda:N")
        return value

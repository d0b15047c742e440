"""The JSON bodies of the training API. Every field is used, is a label, or is an error that names it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal, TypeVar

from pydantic import Field, ValidationError

from graft.errors import GraftError
from graft.serving.tinker.targets import TargetTable
from graft.utils.strict import Strict, described

Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._\-]{0,199}$")]
"""The name of a checkpoint: it becomes the name of a folder."""
Labels = dict[str, Any]
Ttl = Annotated[int | None, Field(gt=0)]
B = TypeVar("B", bound="Body")


class Body(Strict):
    """A body. `type` says again which it is."""

    type: str | None = None


class SessionBody(Body):
    tags: list[str] = []
    user_metadata: Labels | None = None
    sdk_version: str
    project_id: str | None = None
    display_name: str | None = None


class LoraConfig(Strict):
    rank: int = 32
    seed: int | None = None
    train_unembed: bool = True
    train_mlp: bool = True
    train_attn: bool = True


class OptimizerConfig(Strict):
    type: Literal["adamw"] = "adamw"


class ModelBody(Body):
    session_id: str
    model_seq_id: int = Field(ge=0)
    base_model: str
    lora_config: LoraConfig = LoraConfig()
    optimizer_config: OptimizerConfig = OptimizerConfig()
    user_metadata: Labels | None = None


class AdamParams(Strict):
    type: Literal["adamw"] = "adamw"
    learning_rate: float = Field(default=1e-4, ge=0)
    beta1: float = Field(default=0.9, ge=0, lt=1)
    beta2: float = Field(default=0.95, ge=0, lt=1)
    eps: float = Field(default=1e-12, ge=0)
    weight_decay: float = Field(default=0.0, ge=0)
    grad_clip_norm: float = Field(default=0.0, ge=0)


class StepBody(Body):
    model_id: str
    seq_id: int
    adam_params: AdamParams | None = None
    optimizer_params: AdamParams | None = None

    @property
    def params(self) -> AdamParams:
        return self.adam_params or self.optimizer_params or AdamParams()


class SaveBody(Body):
    model_id: str
    seq_id: int
    path: Name
    overwrite: bool = False
    ttl_seconds: Ttl = None
    user_metadata: Labels | None = None


class SamplerSaveBody(Body):
    model_id: str
    seq_id: int
    path: Name | None = None
    sampling_session_seq_id: int | None = None
    kind: Literal["snapshot", "inflight"] = "snapshot"
    ttl_seconds: Ttl = None
    user_metadata: Labels | None = None


class LoadBody(Body):
    """Into a model that is there (model_id, seq_id), or into a new one (session_id, model_seq_id)."""

    model_id: str | None = None
    seq_id: int | None = None
    session_id: str | None = None
    model_seq_id: int | None = None
    path: str
    optimizer: bool
    optimizer_config: OptimizerConfig = OptimizerConfig()
    base_model: str | None = None
    user_metadata: Labels | None = None
    weights_access_token: str | None = None


class SamplerBody(Body):
    session_id: str
    sampling_session_seq_id: int
    base_model: str | None = None
    model_path: str | None = None


class TextChunk(Strict):
    type: Literal["encoded_text"] = "encoded_text"
    tokens: list[int]


class Prompt(Strict):
    chunks: list[TextChunk]

    @property
    def tokens(self) -> list[int]:
        return [token for chunk in self.chunks for token in chunk.tokens]


class SamplingParams(Strict):
    max_tokens: int | None = Field(default=None, ge=1)
    seed: int | None = None
    stop: str | list[str] | list[int] | None = None
    temperature: float = 1.0
    top_k: int = -1
    top_p: float = 1.0


class SampleBody(Body):
    sampling_session_id: str
    seq_id: int
    num_samples: int = Field(default=1, ge=1)
    prompt: Prompt
    sampling_params: SamplingParams = SamplingParams()
    prompt_logprobs: bool | None = None
    topk_prompt_logprobs: int = Field(default=0, ge=0)
    topk_sample_logprobs: int = Field(default=0, ge=0)
    prompt_logprobs_last_n: int | None = Field(default=None, ge=1)
    target_prompt_logprobs: TargetTable | None = None
    prompt_alt_tokens_k: int = Field(default=0, ge=0)
    record_stability_info: bool = False


class FuturesTarget(Strict):
    type: Literal["sampling_session"] = "sampling_session"
    sampling_session_id: str
    cloned_sampler_id: int = Field(default=0, ge=0)


class FuturesBody(Body):
    target: FuturesTarget
    prev_cursor: int = Field(default=0, ge=0, lt=2**63)
    timeout: float | None = Field(default=None, ge=0)
    retrieved_request_ids: list[Annotated[str, Field(pattern=r"^request-[0-9]{1,18}$")]] = []


def read(kind: type[B], fields: Mapping[str, Any]) -> B:
    """Return a body. Raises `GraftError` for fields that are unknown or wrong."""
    try:
        return kind.model_validate(fields)
    except ValidationError as error:
        raise GraftError(described(error, kind.model_fields)) from error

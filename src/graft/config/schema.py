"""What a run is: one YAML of `base`, `adapter`, `data`, `train` and `eval`.

All models are frozen, refuse unknown keys and convert no types ("16" is not a number). The text under a field is what
`--help`, the JSON schema and the documentation show.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import (
    BeforeValidator,
    Field,
    field_serializer,
    field_validator,
    model_validator,
)

from graft.config.compiling import why_not_compiled
from graft.config.data import DataConfig
from graft.config.objectives import AnyObjective
from graft.config.scheduling import SchedulerConfig
from graft.config.section import Section

if TYPE_CHECKING:
    from graft.adapters.base import AdapterConfig
else:  # validated by graft.adapters, which needs torch: imported when an adapter is there to validate
    AdapterConfig = Any

DTYPES = Literal["auto", "float32", "bfloat16"]
SCHEDULES = Literal[
    "linear", "cosine", "cosine_with_restarts", "polynomial", "constant", "constant_with_warmup", "inverse_sqrt"
]


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


class TrainConfig(Section):
    """How the adapter learns."""

    objective: AnyObjective = None
    """What is learnt from pairs of answers (data.task preference): dpo, ipo, cpo, orpo or simpo, or a mapping with that kind and its
    settings; null learns to write the answers."""
    epochs: float = Field(default=1.0, gt=0)
    """Passes over the training data."""
    steps: int | None = Field(default=None, ge=1)
    """Optimiser steps; overrides epochs."""
    batch_size: int = Field(default=16, ge=1)
    """Samples per optimiser step."""
    token_budget: int = Field(default=4096, ge=1)
    """Tokens per forward pass: a step is cut into micro-batches of at most this size. Changes memory, not results."""
    lr: float = Field(default=3e-4, gt=0)
    """Peak learning rate of AdamW."""
    schedule: SCHEDULES = "linear"
    """Course of the learning rate after warm-up, by its name in transformers."""
    warmup: int | float = Field(default=0, ge=0)
    """Steps (a whole number) or fraction of all steps (below 1) in which the learning rate rises from zero."""
    weight_decay: float = Field(default=0.0, ge=0)
    """AdamW's decoupled weight decay, on the adapter's matrices and vectors alike."""
    betas: Annotated[tuple[float, float], Field(strict=False)] = (0.9, 0.999)
    """AdamW's decay rates of the first and second moment."""
    eps: float = Field(default=1e-8, gt=0)
    """AdamW's epsilon."""
    clip: float | None = Field(default=1.0, gt=0)
    """Largest norm of the gradient, over all parameters of the adapter; null does not clip."""
    seed: int = Field(default=0, ge=0)
    """Seed of initialisation, order and dropout."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, more time."""
    compile: bool = False
    """Run the base as one compiled graph (torch.compile): padded batches, no dropout, minutes until the first step."""
    kernels: Literal["auto", "off", "liger"] = "auto"
    """Triton kernels for norms, rotary positions and SwiGLU: auto is Liger's where graft-llm[gpu] is installed and the base is on a CUDA
    device, else torch's own operations; liger demands them; off is torch's own."""
    layout: Literal["auto", "flat", "padded"] = "auto"
    """One row of all tokens, or padded; auto is flat where the model proves equal on the first batch, else padded."""
    validate_every: int | None = Field(default=None, ge=1)
    """Steps between validations; null validates at the end of each epoch."""
    patience: int | None = Field(default=None, ge=1)
    """Validations without improvement before the run stops; null never stops early."""
    save_every: int | None = Field(default=None, ge=1)
    """Steps between checkpoints; null saves at each validation and at the end."""
    keep: int = Field(default=3, ge=1)
    """Latest checkpoints that stay on the disk (the best one stays besides)."""
    init_from: str | None = None
    """Folder of an adapter to start from in place of a fresh one."""
    loggers: list[Literal["tensorboard", "wandb", "trackio"]] = Field(default_factory=list)
    """Trackers that receive the metrics besides metrics.jsonl; each needs graft-llm[track]."""
    log_every: int = Field(default=1, ge=1)
    """Steps between lines of metrics.jsonl."""

    @field_validator("warmup")
    @classmethod
    def _warmup_is_steps_or_fraction(cls, value: int | float) -> int | float:
        if isinstance(value, float) and value >= 1:
            raise ValueError("must be a whole number of steps, or a fraction of all steps below 1")
        return value

    @field_validator("betas")
    @classmethod
    def _betas_lie_below_one(cls, value: tuple[float, float]) -> tuple[float, float]:
        if not all(0 <= beta < 1 for beta in value):
            raise ValueError("must be two numbers of at least 0 and below 1")
        return value

    @model_validator(mode="after")
    def _constant_has_no_warmup(self) -> TrainConfig:
        if self.schedule == "constant" and self.warmup:
            raise ValueError("schedule 'constant' has no warm-up: use 'constant_with_warmup', or warmup: 0")
        return self

    @model_validator(mode="after")
    def _an_initial_adapter_as_reference_needs_one(self) -> TrainConfig:
        if getattr(self.objective, "reference", "base") == "init" and self.init_from is None:
            raise ValueError(
                "objective.reference is init, but there is no train.init_from: name the adapter's folder there"
            )
        return self


class EvalConfig(Section):
    """What is evaluated, and how answers are generated and compared."""

    tasks: list[str] = Field(default_factory=list)
    """Benchmarks, or groups of them, that `graft eval` asks; none evaluates on a data file."""
    protocol: str = "strict"
    """How benchmarks are asked and judged: llm-adapters, strict, math-verify, rank or bleu."""
    data: str | None = None
    """Folder that holds the benchmarks' files; null reads them from the hub."""
    limit: int | None = Field(default=None, ge=1)
    """Samples to evaluate, from the start; null evaluates all."""
    max_new_tokens: int = Field(default=256, ge=1)
    """Longest answer on data files, in tokens; the protocol of a benchmark says its own."""
    metric: Literal["auto", "exact", "numeric"] = "auto"
    """How an answer is compared on data files: as text, or by its last number; auto is numeric where every reference has a number."""
    token_budget: int = Field(default=8192, ge=1)
    """Tokens per generation batch, prompts and room for the answers together."""


def _parse_adapter(value: Any) -> Any:
    from graft.adapters import parse

    return parse(value)


class RunConfig(Section):
    """One run of Graft: a single job. A run of several has `jobs` (see `graft.config.jobs`)."""

    BESIDE: ClassVar[tuple[str, ...]] = ("jobs",)
    """Keys of a run that this model does not hold."""

    base: BaseConfig
    """The frozen model."""
    adapter: Annotated[AdapterConfig, BeforeValidator(_parse_adapter)]
    """A mapping with a kind and its fields, or the name of a preset."""
    data: DataConfig
    """What is trained on."""
    train: TrainConfig = Field(default_factory=TrainConfig)
    """How the adapter learns."""
    eval: EvalConfig = Field(default_factory=EvalConfig)
    """How answers are generated and compared."""
    scheduler: SchedulerConfig = Field(default_factory=SchedulerConfig)
    """Which jobs run when, of those that are submitted while this one runs."""

    def each(self) -> dict[str, RunConfig]:
        """The jobs by name: this one, called like its kind or the last part of its preset."""
        from graft.adapters import Preset

        adapter: Any = self.adapter
        return {
            adapter.preset.rsplit("/", 1)[-1].replace("+", "p") if isinstance(adapter, Preset) else adapter.kind: self
        }

    def priority(self, name: str) -> int:
        """The priority of the only job."""
        return 0

    def common(self) -> TrainConfig:
        """Settings of training that all jobs share."""
        return self.train

    @field_serializer("adapter")
    def _adapter_as_written(self, value: Any) -> Any:
        from graft.adapters import Preset

        return {"preset": value.preset, **value.changes} if isinstance(value, Preset) else value.model_dump(mode="json")

    @model_validator(mode="after")
    def _early_stopping_needs_validation(self) -> RunConfig:
        for name in ("validate_every", "patience"):
            if getattr(self.train, name) is not None and not self.data.validation:
                raise ValueError(f"train.{name} has no effect without validation data: set data.validation")
        return self

    @model_validator(mode="after")
    def _what_is_compiled_can_be(self) -> RunConfig:
        if self.train.compile and (reason := why_not_compiled(self)) is not None:
            raise ValueError(f"train.compile does not go with {reason}")
        return self

    @model_validator(mode="after")
    def _pairs_and_objectives_go_together(self) -> RunConfig:
        objective = self.train.objective
        if self.data.task == "preference" and objective is None:
            raise ValueError(
                "data.task is preference: say what is learnt from the pairs, e.g. train.objective: dpo (or ipo, cpo, orpo, simpo)"
            )
        if self.data.task != "preference" and objective is not None:
            raise ValueError(
                f"train.objective {objective.kind} learns from pairs of answers, but data.task is {self.data.task}: set data.task: "
                "preference, or remove the objective"
            )
        return self

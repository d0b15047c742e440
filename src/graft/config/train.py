"""The block `train`: how an adapter is trained."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from graft.config.activations import Activations, by_one_name
from graft.config.methods import AdapterMethod, AnyMethod, FullMethod, MeZOMethod, QFTMethod
from graft.config.objectives import AnyObjective, DPOConfig, IPOConfig, KTOConfig
from graft.config.optimizers import (
    LARGEST,
    SHARED,
    AdamWConfig,
    AnyOptimizer,
    Betas,
    LionConfig,
    OptimizerConfig,
    SGDConfig,
)
from graft.config.section import Place, Section

SCHEDULES = Literal[
    "linear", "cosine", "cosine_with_restarts", "polynomial", "constant", "constant_with_warmup", "inverse_sqrt"
]


class TrainConfig(Section):
    """How the adapter is trained."""

    method: AnyMethod = Field(default_factory=AdapterMethod)
    """The method of training: adapter, full, qft or mezo, or a mapping with this kind and its settings."""
    objective: AnyObjective = None
    """What to learn besides the answers. For pairs of answers (data.task preference): dpo, ipo, cpo, orpo, simpo or kto. For two random
    passes of each sample (AdaMix): consistency. For answers that a model drew: importance_sampling, ppo, cispo,
    dro or gspo. Or a mapping with this kind and its settings; null learns the answers alone."""
    epochs: float = Field(default=1.0, gt=0)
    """Passes over the training data."""
    steps: int | None = Field(default=None, ge=1)
    """Number of optimiser steps; overrides epochs."""
    batch_size: int = Field(default=16, ge=1)
    """Samples per optimiser step."""
    token_budget: int = Field(default=4096, ge=1)
    """Tokens per forward pass: a step is cut into micro-batches of at most this size. Changes memory, not results."""
    lr: float = Field(default=3e-4, gt=0, le=LARGEST)
    """Peak learning rate."""
    optimizer: AnyOptimizer = None
    """The optimiser: adamw, adamw-8bit, paged-adamw, paged-adamw-8bit, lion, lion-8bit, adafactor or sgd, or a mapping with this kind and
    its settings; null is adamw, or what train.method takes: lion for qft, sgd for mezo."""
    accumulate_in: Literal["float32"] | None = None
    """Number format in which the gradients of a step's micro-batches are added up, for method full on a base in bfloat16; null is that of
    the parameters."""
    schedule: SCHEDULES = "linear"
    """Schedule of the learning rate after warm-up, by its name in transformers."""
    warmup: int | float = Field(default=0, ge=0)
    """Steps (a whole number), or fraction of all steps (below 1), in which the learning rate rises from zero."""
    weight_decay: float | None = Field(default=None, ge=0, le=LARGEST)
    """The optimiser's weight decay, for the adapter's matrices and vectors alike; null is 0."""
    betas: Betas = None
    """The optimiser's decay rates of moments; null is its usual ones."""
    eps: float | None = Field(default=None, gt=0, le=LARGEST)
    """The epsilon of AdamW; null is its usual one."""
    clip: float | None = Field(default=1.0, gt=0)
    """Maximum norm of the gradient over all parameters of the adapter; null does not clip. MeZO knows the gradient by its slopes along
    noise alone, whose root mean square estimates this norm."""
    seed: int = Field(default=0, ge=0, lt=2**63)
    """Seed of initialisation, sample order and dropout."""
    activations: Activations = "keep"
    """What becomes of the activations that the backward pass needs. keep: they stay. recompute: each block keeps its input and runs again,
    which takes less memory and more time. offload: they move from the GPU to the host's memory and back. A mapping from ranges of layers
    says it for each, such as {0-15: recompute, last4: offload}; the others keep theirs."""
    compile: bool = False
    """Whether to run the base as one compiled graph (torch.compile): needs padded batches and no dropout; the first step takes minutes."""
    kernels: Literal["auto", "off", "liger"] = "auto"
    """Triton kernels for norms, rotary positions and SwiGLU: auto uses Liger's if graft-llm[gpu] is installed and the base is on a CUDA
    device, else torch's own operations; liger requires them; off uses torch's own."""
    layout: Literal["auto", "flat", "padded"] = "auto"
    """flat: all tokens in one row (packing without padding); padded: one row per sample; auto is flat if the first batch gives the same
    result in both layouts, else padded."""
    validate_every: int | None = Field(default=None, ge=1)
    """Steps between validations; null validates at the end of each epoch."""
    answers: int | None = Field(default=None, ge=1)
    """Validation questions that the model answers at each validation, from the start; metrics.jsonl then has answer_accuracy, the share of
    right ones by eval.metric. Null answers none."""
    patience: int | None = Field(default=None, ge=1)
    """Validations without improvement before the run stops; null never stops early."""
    save_every: int | None = Field(default=None, ge=1)
    """Steps between checkpoints; null saves at each validation and at the end."""
    keep: int = Field(default=3, ge=1)
    """Number of latest checkpoints to keep; the best one is kept too."""
    init_from: Place | None = None
    """Adapter folder to start from, in place of a fresh adapter."""
    any_base: bool = False
    """Accept an adapter in init_from that was trained on other base weights."""
    loggers: list[Literal["tensorboard", "wandb", "trackio"]] = Field(default_factory=list)
    """Trackers that receive the metrics in addition to metrics.jsonl; each needs graft-llm[track]."""
    log_every: int = Field(default=1, ge=1)
    """Steps between lines of metrics.jsonl."""

    @model_validator(mode="before")
    @classmethod
    def _checkpointing_by_one_name(cls, value: Any) -> Any:
        return by_one_name(value)

    @field_validator("warmup")
    @classmethod
    def _warmup_is_steps_or_fraction(cls, value: int | float) -> int | float:
        if isinstance(value, float) and value >= 1:
            raise ValueError("must be a whole number of steps, or a fraction of all steps below 1")
        return value

    @property
    def usual_optimizer(self) -> OptimizerConfig:
        """The optimiser that the method takes where none is named."""
        if isinstance(self.method, QFTMethod):
            return LionConfig()
        return SGDConfig() if isinstance(self.method, MeZOMethod) else AdamWConfig()

    @model_validator(mode="after")
    def _mezo_takes_what_it_uses(self) -> TrainConfig:
        if not isinstance(self.method, MeZOMethod):
            return self
        if self.optimizer is not None and not (isinstance(self.optimizer, SGDConfig) and not self.optimizer.momentum):
            raise ValueError(
                "method mezo updates parameters along its noise, as sgd without momentum does: set optimizer to sgd, or remove it"
            )
        for key, default in (("activations", "keep"), ("compile", False)):
            if getattr(self, key) != default:
                raise ValueError(f"method mezo has no backward pass, so {key} has no use: remove it")
        return self

    @model_validator(mode="after")
    def _an_update_in_backward_sees_one_gradient_at_a_time(self) -> TrainConfig:
        method = self.method
        if isinstance(method, QFTMethod) and self.optimizer is not None and self.optimizer.kind != "lion":
            raise ValueError(
                f"method qft updates by Lion with a state of its own in 8 bits, not by {self.optimizer.kind}: set optimizer to lion, or "
                "remove it"
            )
        if method.rule == "in_backward" and self.clip is not None:
            raise ValueError(
                f"method {method.kind} with update: in_backward never has all gradients at once, so their norm cannot be clipped: set clip "
                "to null, or update to after"
            )
        if method.rule == "in_backward" and self.accumulate_in is not None:
            raise ValueError(
                "accumulate_in has no effect with update: in_backward, which takes a step in one pass: remove it"
            )
        return self

    @model_validator(mode="after")
    def _a_base_that_trains_is_no_reference(self) -> TrainConfig:
        if self.accumulate_in is not None and not isinstance(self.method, FullMethod):
            raise ValueError(
                f"accumulate_in has no effect with method {self.method.kind}: it is for full training. Remove it"
            )
        if self.method.parts is None:
            return self
        if isinstance(self.objective, DPOConfig | IPOConfig | KTOConfig):
            raise ValueError(
                f"objective {self.objective.kind} compares with the base, which method {self.method.kind} itself trains: use "
                "cpo, orpo or simpo, or train an adapter"
            )
        if self.init_from is not None:
            raise ValueError(
                f"init_from is an adapter to start from, but method {self.method.kind} trains the base: to start from a trained model, set "
                "base.model to its folder"
            )
        return self

    @model_validator(mode="after")
    def _optimizer_takes_its_settings(self) -> TrainConfig:
        optimizer = self.optimizer or self.usual_optimizer
        for key in SHARED:
            if getattr(self, key) is None:
                continue
            if not hasattr(optimizer, key):
                raise ValueError(f"optimizer {optimizer.kind} has no {key}: remove train.{key}")
            if getattr(optimizer, key) is not None:
                raise ValueError(f"{key} is set twice, as train.{key} and as train.optimizer.{key}: remove one")
        return self

    @model_validator(mode="after")
    def _constant_has_no_warmup(self) -> TrainConfig:
        if self.schedule == "constant" and self.warmup:
            raise ValueError("schedule 'constant' has no warm-up: use 'constant_with_warmup', or warmup: 0")
        return self

    @model_validator(mode="after")
    def _any_base_is_about_an_initial_adapter(self) -> TrainConfig:
        if self.any_base and self.init_from is None:
            raise ValueError("any_base has no effect without train.init_from: remove it")
        return self

    @model_validator(mode="after")
    def _an_initial_adapter_as_reference_needs_one(self) -> TrainConfig:
        if getattr(self.objective, "reference", "base") == "init" and self.init_from is None:
            raise ValueError("objective.reference is init, but train.init_from is not set: set it to an adapter folder")
        return self

"""What a run is: one YAML of `base`, `adapter`, `data`, `train` and `eval`.

All models are frozen, refuse unknown keys and convert no types ("16" is not a number). The text under a field is what
`--help`, the JSON schema and the documentation show.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, ClassVar

from pydantic import (
    BeforeValidator,
    Field,
    field_serializer,
    model_validator,
)

from graft.config.base import BaseConfig
from graft.config.data import DataConfig
from graft.config.eval import EvalConfig
from graft.config.scheduling import SchedulerConfig
from graft.config.section import Section
from graft.config.train import TrainConfig

if TYPE_CHECKING:
    from graft.adapters.base import AdapterConfig
else:  # validated by graft.adapters, which needs torch: imported when an adapter is there to validate
    AdapterConfig = Any


def _parse_adapter(value: Any) -> Any:
    from graft.adapters.parsing import parse

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
        from graft.adapters.presets import Preset

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
        from graft.adapters.presets import Preset

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


COMPILED_TASKS = ("causal", "preference")


def why_not_compiled(config: RunConfig) -> str | None:
    """What of a run's settings `train.compile` does not go with, and what to do; None where nothing stands against it."""
    from graft.adapters.presets import Preset

    if config.data.task not in COMPILED_TASKS:
        return f"data.task {config.data.task}: it is for {' and '.join(COMPILED_TASKS)}"
    if config.train.layout == "flat":
        return "train.layout flat: a graph cannot keep segments apart. Use layout: auto or padded"
    if config.train.gradient_checkpointing:
        return "train.gradient_checkpointing: choose one of them"
    if config.train.kernels == "liger":
        return "train.kernels liger: a graph fuses these operations itself. Use kernels: auto or off"
    if config.base.dropout:
        return "base.dropout: a graph draws other numbers than eager code"
    adapter = config.adapter.resolve(frozenset()) if isinstance(config.adapter, Preset) else config.adapter
    rate = max(getattr(part, "dropout", 0.0) for part in adapter.parts())
    if rate > 0.0:
        return f"an adapter's dropout of {rate}, whose masks come from seeds that a graph does not know: set dropout: 0"
    return None

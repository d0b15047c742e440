"""The configuration of a run: one YAML with the blocks `base`, `adapter`, `data`, `train` and `eval`.

All models are frozen, refuse unknown keys and convert no types ("16" is not a number). The docstring under a field appears in `--help`,
in the JSON schema and in the documentation.
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
from graft.config.distributed import DistributedConfig
from graft.config.eval import EvalConfig
from graft.config.methods import MeZOMethod
from graft.config.objectives import ConsistencyConfig, KTOConfig
from graft.config.policies import PolicyConfig
from graft.config.scheduling import SchedulerConfig
from graft.config.section import Section
from graft.config.train import TrainConfig

if TYPE_CHECKING:
    from graft.adapters.base import AdapterConfig
else:  # graft.adapters validates it but needs torch, so it is imported only when there is an adapter to validate
    AdapterConfig = Any


def parse_adapter(value: Any) -> Any:
    """Turn what the user wrote for an adapter into its config. The room of adapters needs torch, so it is imported only here."""
    if value is None:
        return None
    from graft.adapters.parsing import parse

    return parse(value)


def as_written(adapter: Any) -> Any:
    """Return what the user may write for an adapter's config or preset."""
    from graft.adapters.presets import Preset

    if adapter is None:
        return None
    return (
        {"preset": adapter.preset, **adapter.changes}
        if isinstance(adapter, Preset)
        else adapter.model_dump(mode="json")
    )


class RunConfig(Section):
    """A run with a single job. A run with several has the key `jobs` (see `graft.config.jobs`)."""

    BESIDE: ClassVar[tuple[str, ...]] = ("jobs",)
    """Keys that a run may have but this model does not; an error message about an unknown key lists them too."""

    base: BaseConfig
    """The frozen model."""
    adapter: Annotated[AdapterConfig | None, BeforeValidator(parse_adapter)] = None
    """A mapping with a kind and its fields, or the name of a preset; null where train.method trains the base itself."""
    data: DataConfig
    """The training data."""
    train: TrainConfig = Field(default_factory=TrainConfig)
    """How the adapter is trained."""
    eval: EvalConfig = Field(default_factory=EvalConfig)
    """How answers are generated and compared."""
    scheduler: SchedulerConfig = Field(default_factory=SchedulerConfig)
    """Which jobs run when, if further jobs are submitted while this one runs."""
    distributed: DistributedConfig = Field(default_factory=DistributedConfig)
    """How the run is dealt to several processes."""

    def each(self) -> dict[str, RunConfig]:
        """Return the jobs by name: only this one, named after its kind, the last part of its preset, or its method."""
        from graft.adapters.presets import Preset

        adapter: Any = self.adapter
        if adapter is None:
            return {self.train.method.kind: self}
        return {
            adapter.preset.rsplit("/", 1)[-1].replace("+", "p") if isinstance(adapter, Preset) else adapter.kind: self
        }

    def priority(self, name: str) -> int:
        """Return the priority of the only job."""
        return 0

    def common(self) -> TrainConfig:
        """Return the training settings that all jobs share."""
        return self.train

    @field_serializer("adapter")
    def _adapter_as_written(self, value: Any) -> Any:
        return as_written(value)

    @model_validator(mode="after")
    def _an_adapter_or_the_base_trains(self) -> RunConfig:
        method = self.train.method
        if method.parts is None and self.adapter is None:
            raise ValueError(
                "missing key 'adapter': name a kind, such as lora, or train the base itself with train.method full"
                if method.kind != "mezo"
                else "missing key 'adapter': name a kind, such as lora, or set train.method.parts to all to train the base itself"
            )
        if method.parts is not None and self.adapter is not None:
            raise ValueError(
                f"train.method {method.kind} trains the base itself, so an adapter has no use: remove the key `adapter`. (An adapter of "
                "kind full trains modules too, as a difference beside a base that stays as it is: for that, remove train.method)"
            )
        if method.parts is not None and self.base.quantize is not None:
            raise ValueError(
                f"train.method {method.kind} trains the base's own weights, which base.quantize: {self.base.quantize} makes too coarse to "
                "train: remove it, or train an adapter"
            )
        if method.parts is not None and self.base.reversible is not None:
            raise ValueError(
                f"train.method {method.kind} leaves an ordinary model, which base.reversible would not be: leave out one of the two"
            )
        return self

    @model_validator(mode="after")
    def _early_stopping_needs_validation(self) -> RunConfig:
        for name in ("validate_every", "patience", "answers"):
            if getattr(self.train, name) is not None and not self.data.validation:
                raise ValueError(f"train.{name} has no effect without validation data: set data.validation")
        return self

    @model_validator(mode="after")
    def _answers_are_written(self) -> RunConfig:
        if self.train.answers is not None and self.data.task != "causal":
            raise ValueError(
                f"train.answers is for data.task causal, whose answers are written; it is {self.data.task}: remove it"
            )
        return self

    @model_validator(mode="after")
    def _compile_goes_with_the_rest(self) -> RunConfig:
        if self.train.compile and (reason := compile_obstacle(self)) is not None:
            raise ValueError(f"train.compile does not go with {reason}")
        return self

    @model_validator(mode="after")
    def _a_reversible_base_recomputes_by_itself(self) -> RunConfig:
        if self.base.reversible is not None and self.train.activations != "keep":
            raise ValueError(
                "train.activations has no effect with base.reversible, which keeps no activations of its blocks: remove it"
            )
        return self

    @model_validator(mode="after")
    def _pairs_and_objectives_go_together(self) -> RunConfig:
        objective = self.train.objective
        if isinstance(objective, ConsistencyConfig):
            return self._two_passes_differ()
        if isinstance(objective, PolicyConfig):
            return self._drawn_answers_are_tokens(objective)
        if self.data.task == "preference" and objective is None:
            raise ValueError(
                "data.task is preference but train.objective is not set: choose one of dpo, ipo, cpo, orpo, simpo and kto"
            )
        if self.data.task != "preference" and objective is not None:
            what = "answers that are marked good or bad" if isinstance(objective, KTOConfig) else "pairs of answers"
            raise ValueError(
                f"train.objective {objective.kind} learns from {what}, but data.task is {self.data.task}: set data.task: "
                "preference, or remove the objective"
            )
        return self

    def _drawn_answers_are_tokens(self, objective: PolicyConfig) -> RunConfig:
        """Check that a run on drawn answers is causal."""
        if self.data.task != "causal":
            raise ValueError(
                f"train.objective {objective.kind} learns from drawn answers, but data.task is {self.data.task}: set data.task: causal"
            )
        return self

    def _two_passes_differ(self) -> RunConfig:
        """Check that the two passes of the objective consistency can differ, and that their distributions can."""
        if self.data.task in ("regression", "preference"):
            why = (
                "one value has no distribution" if self.data.task == "regression" else "it compares passes, not answers"
            )
            raise ValueError(f"train.objective consistency has no meaning for data.task {self.data.task}: {why}")
        if isinstance(self.train.method, MeZOMethod):
            raise ValueError(
                "train.objective consistency compares random passes, but those of train.method mezo draw nothing"
            )
        if any(part.compares_rows for part in _parts_of(self)):
            raise ValueError(
                "train.objective consistency runs each sample twice, and information would take its second pass for another sample: leave "
                "out one of the two"
            )
        if not (
            self.base.dropout or _dropout_of(self) or any(getattr(part, "draws", False) for part in _parts_of(self))
        ):
            raise ValueError(
                "train.objective consistency compares two passes of a sample, but nothing in this run draws at random: take a mixture "
                "(adapter.kind: mixture), or set a dropout"
            )
        return self

    @model_validator(mode="after")
    def _mezo_goes_with_the_adapter(self) -> RunConfig:
        if not isinstance(self.train.method, MeZOMethod):
            return self
        if added := [name for part in _parts_of(self) for name in part.added_losses]:
            raise ValueError(
                f"train.method mezo runs in evaluation mode, where {added[0]} adds no loss: remove it, or use another method"
            )
        if any(getattr(part, "draws", False) for part in _parts_of(self)):
            raise ValueError(
                "train.method mezo runs without random draws, so a mixture would never use one expert: take its inner kind"
            )
        if self.base.dropout or (rate := _dropout_of(self)):
            name = "base.dropout" if self.base.dropout else f"an adapter's dropout of {rate}"
            raise ValueError(
                f"train.method mezo compares two passes without dropout, so {name} has no use: turn it off"
            )
        if self.base.reversible is not None:
            raise ValueError(
                "train.method mezo has no backward pass, so base.reversible saves nothing: leave out one of the two"
            )
        needing = [part.kind for part in _parts_of(self) if part.needs_gradients]
        if needing:
            raise ValueError(
                f"train.method mezo makes no gradients, but {needing[0]} needs them to choose ranks: set target_rank to null, or train "
                "another kind"
            )
        return self


COMPILED_TASKS = ("causal", "preference")


def compile_obstacle(config: RunConfig) -> str | None:
    """Return the setting of a run that does not go with `train.compile`, with the reason or a remedy; None if all are compatible."""
    if config.train.method.parts is not None:
        return f"train.method {config.train.method.kind}: a compiled graph is proved on adapters alone"
    if config.data.task not in COMPILED_TASKS:
        return f"data.task {config.data.task}: it supports {' and '.join(COMPILED_TASKS)}"
    if config.train.layout == "flat":
        return "train.layout flat: a compiled graph cannot keep the sequences apart. Use layout: auto or padded"
    if config.base.reversible is not None:
        return (
            "base.reversible: its backward pass runs the blocks again, which a graph does not see. Use one of the two"
        )
    if config.train.activations != "keep":
        return "train.activations: a compiled graph chooses by itself what it computes again. Use one of the two"
    if config.train.kernels == "liger":
        return "train.kernels liger: a compiled graph fuses these operations itself. Use kernels: auto or off"
    if isinstance(config.train.objective, KTOConfig):
        return "train.objective kto: its mismatched sequences run without gradients"
    if config.train.answers is not None:
        return "train.answers: writing answers would compile again for each length"
    if config.base.dropout:
        return "base.dropout: a compiled graph draws other random numbers than eager code"
    if added := [name for part in _parts_of(config) for name in part.added_losses]:
        return f"{added[0]}, a loss on the real tokens of each row: a compiled graph does not know the padding"
    if drawing := [part.kind for part in _parts_of(config) if getattr(part, "draws", False)]:
        return f"adapter kind {drawing[0]}: its draws come from seeds that a compiled graph cannot use"
    if rate := _dropout_of(config):
        return f"an adapter's dropout of {rate}: its masks come from seeds that a compiled graph cannot use. Set dropout: 0"
    return None


def _parts_of(config: RunConfig) -> Any:
    """Every kind that a run's adapter is made of; none where it has no adapter."""
    from graft.adapters.nesting import every_config
    from graft.adapters.presets import Preset

    if config.adapter is None:
        return ()
    adapter = config.adapter.resolve(frozenset()) if isinstance(config.adapter, Preset) else config.adapter
    return tuple(every_config(adapter))


def _dropout_of(config: RunConfig) -> float:
    """The highest dropout rate of an adapter's parts."""
    rates = (getattr(part, name, 0.0) for part in _parts_of(config) for name in ("dropout", "hidden_dropout"))
    return max(rates, default=0.0)

"""A run of many jobs: a mapping from names to jobs, each with its own adapter, data, training and evaluation, on one base.

What a job does not say comes from the sections of the same name at the top, field by field, and what neither says from the defaults. An
adapter with a kind, a preset or a list of its own replaces the one at the top; any other mapping changes fields of it. A mapping or
list inside a field (`data.train`) is replaced as a whole.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import BeforeValidator, Field, field_serializer, field_validator, model_validator

from graft.config.base import BaseConfig
from graft.config.data import DataConfig
from graft.config.document import Document, Key, KeyPath, dotted
from graft.config.eval import EvalConfig
from graft.config.run import RunConfig
from graft.config.scheduling import SchedulerConfig
from graft.config.section import Section
from graft.config.train import TrainConfig

SHARED = frozenset(
    {
        "token_budget",
        "gradient_checkpointing",
        "compile",
        "kernels",
        "layout",
        "save_every",
        "keep",
        "loggers",
        "log_every",
    }
)
"""Fields of `train` that belong to the pass over the base or to the run folder, and so to all jobs together."""
SECTIONS: dict[str, type[Section]] = {"data": DataConfig, "train": TrainConfig, "eval": EvalConfig}
REFERENCE = "--reference"
"""What is behind a job's name in that of the frozen adapter that its answers are compared with."""
NAME = re.compile(rf"(?!training$|base$|.*{REFERENCE}$)[A-Za-z0-9][A-Za-z0-9_\-]*")
"""It becomes part of tensor names; `base` is what results call the bare base."""


class JobConfig(Section):
    """One job: what it does not say comes from the top."""

    adapter: Any = None
    """An adapter of its own, or changes to the one at the top."""
    data: dict[str, Any] = Field(default_factory=dict)
    """Fields of `data` that are the job's own."""
    train: dict[str, Any] = Field(default_factory=dict)
    """Fields of `train` that are the job's own."""
    eval: dict[str, Any] = Field(default_factory=dict)
    """Fields of `eval` that are the job's own."""
    priority: int = 0
    """Jobs with a higher number go first; among equals the one that came first."""

    @field_serializer("adapter")
    def _adapter_as_values(self, value: Any) -> Any:
        return _adapter_values(value)


def _empty_for_null(value: Any) -> Any:
    """A name with nothing behind it is a job that takes everything from the top."""
    return {} if value is None else value


class JobsConfig(Section):
    """A run of many jobs on one base."""

    base: BaseConfig
    """The frozen model, shared by all jobs."""
    adapter: Any = None
    """The adapter of jobs that name none."""
    data: dict[str, Any] = Field(default_factory=dict, validate_default=True)
    """Data settings of jobs that say nothing else."""
    train: dict[str, Any] = Field(default_factory=dict, validate_default=True)
    """Training settings of jobs that say nothing else, and those that all jobs share."""
    eval: dict[str, Any] = Field(default_factory=dict, validate_default=True)
    """Evaluation settings of jobs that say nothing else."""
    scheduler: SchedulerConfig = Field(default_factory=SchedulerConfig)
    """Which jobs run when."""
    jobs: Annotated[dict[str, Annotated[JobConfig, BeforeValidator(_empty_for_null)]], Field(min_length=1)]
    """The jobs by name."""

    @field_validator("data", "train", "eval")
    @classmethod
    def _with_defaults(cls, value: dict[str, Any], info: Any) -> dict[str, Any]:
        """All settings are written down, so that a later version with other defaults resumes the same run."""
        return {**_defaults(SECTIONS[info.field_name]), **value}

    @field_validator("jobs")
    @classmethod
    def _names_are_usable(cls, value: dict[str, JobConfig]) -> dict[str, JobConfig]:
        for name in value:
            check_name(name)
        return value

    @field_serializer("adapter")
    def _adapter_as_values(self, value: Any) -> Any:
        return _adapter_values(value)

    @model_validator(mode="after")
    def _base_dropout_needs_a_single_job(self) -> JobsConfig:
        if self.base.dropout and len(self.jobs) > 1:
            raise ValueError(
                "base.dropout is for a single job: with several, what it drops would depend on the company"
            )
        return self

    def each(self) -> dict[str, RunConfig]:
        """Every job as the run that it is alone, by name."""
        top = self.model_dump(exclude={"jobs", "scheduler"})
        return {name: RunConfig.model_validate(merged(top, job.model_dump())) for name, job in self.jobs.items()}

    def priority(self, name: str) -> int:
        """The priority of a job."""
        return self.jobs[name].priority

    def common(self) -> TrainConfig:
        """Settings of training that all jobs share; the other fields are at their defaults."""
        return TrainConfig.model_validate({name: self.train[name] for name in SHARED})


AnyRun = RunConfig | JobsConfig


def check_name(name: str) -> None:
    """Raises `ValueError` for a name that no job can have."""
    if not NAME.fullmatch(name):
        raise ValueError(
            f"'{name}' cannot name a job: letters, digits, '_' and '-' after a letter or digit, neither 'base' nor 'training', and not "
            f"'{REFERENCE}' at the end"
        )


def resolve_job(run: AnyRun, given: Mapping[str, Any]) -> RunConfig:
    """A job that joins a run, from what it says itself, as the run that it would be alone. Raises pydantic's `ValidationError`."""
    top = run.model_dump(exclude={"jobs", "scheduler"})
    return RunConfig.model_validate(merged(top, JobConfig.model_validate(dict(given)).model_dump()))


def shared_fields(job: Mapping[str, Any]) -> list[KeyPath]:
    """The paths, in a job, of what is not its own to say."""
    return [("train", key) for key in _mapping(job.get("train")) if key in SHARED]


def merged(top: Mapping[str, Any], job: Mapping[str, Any]) -> dict[str, Any]:
    """The run that a job is alone, as plain values: the job's fields over those at the top. What is no mapping counts as empty."""
    sections = {name: {**_mapping(top.get(name)), **_mapping(job.get(name))} for name in SECTIONS}
    return {"base": top.get("base"), **_adapter(top.get("adapter"), job.get("adapter")), **sections}


def is_whole(adapter: Any) -> bool:
    """Whether an adapter stands for itself, and does not only change another."""
    return adapter is not None and not (isinstance(adapter, Mapping) and not {"kind", "preset"} & set(adapter))


def _adapter(top: Any, own: Any) -> dict[str, Any]:
    if is_whole(own) or top is None:
        found = own
    elif own is None:
        found = top
    else:
        found = {**_spelt(top), **own}
    return {} if found is None else {"adapter": found}


def _spelt(adapter: Any) -> dict[str, Any]:
    """The mapping that a name of a kind or preset stands for."""
    from graft.adapters.registry import kinds

    if isinstance(adapter, str):
        return {"kind" if adapter in kinds() else "preset": adapter}
    return dict(adapter) if isinstance(adapter, Mapping) else {"parts": adapter}


def _adapter_values(value: Any) -> Any:
    """Plain values of an adapter: complete where it stands for itself, as written where it changes another."""
    from graft.adapters.parsing import parse
    from graft.adapters.presets import Preset

    if not is_whole(value):
        return value
    parsed = parse(value)
    return {"preset": parsed.preset, **parsed.changes} if isinstance(parsed, Preset) else parsed.model_dump(mode="json")


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def _defaults(model: type[Section]) -> dict[str, Any]:
    """The fields that need not be given, as JSON values."""
    given = {name: field for name, field in model.model_fields.items() if not field.is_required()}
    values = {name: field.get_default(call_default_factory=True) for name, field in given.items()}
    return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}


class JobDocument(Document):
    """One job's merged values, whose places are those where the user wrote them: in the job, or at the top."""

    def __init__(self, whole: Document, name: str) -> None:
        self.whole, self.job = whole, name
        self.own = _mapping(whole.data["jobs"].get(name))
        super().__init__(whole.name, merged(whole.data, self.own))

    def written(self, path: KeyPath) -> KeyPath:
        """The path, in the whole document, of a value of this job."""
        here: tuple[Key, ...] = ("jobs", self.job)
        if not path:
            return here
        own = self.own.get(str(path[0]))
        if path[0] == "adapter":
            inside = is_whole(own) or (isinstance(own, Mapping) and (len(path) == 1 or path[1] in own))
        else:
            inside = isinstance(own, Mapping) and len(path) > 1 and path[1] in own
        return (*here, *path) if inside else path

    def where(self, path: KeyPath) -> str:
        written = self.written(path)
        known = any(place[: len(written)] == written for place in self.whole.places)
        return self.whole.where(written if known else ("jobs", self.job))

    def called(self, path: KeyPath) -> str:
        return dotted(self.written(path))

    @property
    def label(self) -> str:
        return f" of job '{self.job}'"

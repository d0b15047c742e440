"""A run of several jobs on one base: a mapping from names to jobs, each with its own adapter, data, training and evaluation.

A field that a job does not set comes from the block of the same name at the top level; if that does not set it either, from the defaults.
A job's adapter that has a kind or a preset, or is a list, replaces the one at the top level; any other mapping changes fields of it. A
mapping or list inside a field (`data.train`) is replaced as a whole.

    adapter: {kind: lora, rank: 8}
    train: {lr: 1e-3}
    jobs:
      small:                                 # lora of rank 8, lr 1e-3
      large: {adapter: {rank: 64}}           # lora of rank 64, lr 1e-3
      other: {adapter: {kind: series}, train: {lr: 1e-4}}
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import BeforeValidator, Field, field_serializer, field_validator, model_validator

from graft.config.activations import OTHER_NAME, by_one_name
from graft.config.base import BaseConfig
from graft.config.data import DataConfig
from graft.config.distributed import DistributedConfig
from graft.config.document import Document, Key, KeyPath, dotted
from graft.config.eval import EvalConfig
from graft.config.run import RunConfig
from graft.config.scheduling import SchedulerConfig
from graft.config.section import Section
from graft.config.train import TrainConfig

SHARED = frozenset(
    {
        "token_budget",
        "activations",
        "compile",
        "kernels",
        "layout",
        "save_every",
        "keep",
        "loggers",
        "log_every",
    }
)
"""Fields of `train` that concern the forward pass of the base or the run folder, so that all jobs share them."""
SECTIONS: dict[str, type[Section]] = {"data": DataConfig, "train": TrainConfig, "eval": EvalConfig}
REFERENCE = "--reference"
"""The suffix that turns a job's name into the name of its reference: the frozen adapter that its answers are compared with."""
NAME = re.compile(rf"(?!training$|base$|.*{REFERENCE}$)[A-Za-z0-9][A-Za-z0-9_\-]{{0,99}}")
"""The names that a job may have. A name becomes part of tensor names; results call the base without adapters `base`."""


class JobConfig(Section):
    """One job. Fields that it does not set come from the top level."""

    adapter: Any = None
    """An adapter of its own, or changes to the one at the top level."""
    data: dict[str, Any] = Field(default_factory=dict)
    """Fields of `data` that this job sets itself."""
    train: dict[str, Any] = Field(default_factory=dict)
    """Fields of `train` that this job sets itself."""
    eval: dict[str, Any] = Field(default_factory=dict)
    """Fields of `eval` that this job sets itself."""
    priority: int = 0
    """Jobs with a higher priority run first; among equals, the one that came first."""

    @field_serializer("adapter")
    def _adapter_as_values(self, value: Any) -> Any:
        return _adapter_values(value)


def _empty_for_null(value: Any) -> Any:
    """Turn null into an empty job: a name alone (`plain:`) is a job that takes everything from the top level."""
    return {} if value is None else value


class JobsConfig(Section):
    """A run of several jobs on one base."""

    base: BaseConfig
    """The frozen model, shared by all jobs."""
    adapter: Any = None
    """The adapter of jobs that have none of their own."""
    data: dict[str, Any] = Field(default_factory=dict, validate_default=True)
    """Data settings for jobs that do not set their own."""
    train: dict[str, Any] = Field(default_factory=dict, validate_default=True)
    """Training settings for jobs that do not set their own, and those that all jobs share."""
    eval: dict[str, Any] = Field(default_factory=dict, validate_default=True)
    """Evaluation settings for jobs that do not set their own."""
    scheduler: SchedulerConfig = Field(default_factory=SchedulerConfig)
    """Which jobs run when."""
    distributed: DistributedConfig = Field(default_factory=DistributedConfig)
    """How the run is dealt to several processes."""
    jobs: Annotated[dict[str, Annotated[JobConfig, BeforeValidator(_empty_for_null)]], Field(min_length=1)]
    """The jobs by name."""

    @field_validator("data", "train", "eval")
    @classmethod
    def _with_defaults(cls, value: dict[str, Any], info: Any) -> dict[str, Any]:
        """Write all settings down, so that a later version with other defaults resumes the same run."""
        return {**_defaults(SECTIONS[info.field_name]), **by_one_name(value)}

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
                "base.dropout needs a single job: with several, what it drops in one job would depend on the others"
            )
        return self

    @model_validator(mode="after")
    def _jobs_share_a_frozen_base(self) -> JobsConfig:
        for name, job in self.jobs.items():
            if (kind := method_of_base({**self.train, **job.train})) is not None:
                raise ValueError(
                    f"train.method {kind} of job '{name}' trains the base itself, which jobs share: write it as a run of its own, without "
                    "the key `jobs`"
                )
        return self

    def each(self) -> dict[str, RunConfig]:
        """Return the jobs by name, each as the run that it would be alone."""
        top = self.model_dump(exclude={"jobs", "scheduler"})
        return {name: RunConfig.model_validate(merge_job(top, job.model_dump())) for name, job in self.jobs.items()}

    def priority(self, name: str) -> int:
        """Return the priority of a job."""
        return self.jobs[name].priority

    def common(self) -> TrainConfig:
        """Return the training settings that all jobs share; the other fields have their defaults."""
        return TrainConfig.model_validate({name: self.train[name] for name in SHARED})


AnyRun = RunConfig | JobsConfig


def method_of_base(train: Mapping[str, Any]) -> str | None:
    """Return the kind of a section's method where it trains the base itself, as far as its values can be read; else None."""
    method = train.get("method")
    given = method if isinstance(method, Mapping) else getattr(method, "__dict__", {"kind": method})
    kind = given.get("kind")
    return str(kind) if kind in ("full", "qft") or given.get("parts") is not None else None


def check_name(name: Any) -> None:
    """Check the name of a job. Raises `ValueError` if it is not allowed."""
    if not isinstance(name, str) or not NAME.fullmatch(name):
        raise ValueError(
            f"'{name}' cannot name a job: a name has at most 100 letters, digits, '_' and '-', begins with a letter or digit, is "
            f"neither 'base' nor 'training', and does not end with '{REFERENCE}'"
        )


def resolve_job(run: AnyRun, given: Mapping[str, Any]) -> RunConfig:
    """Return a job that joins a run later, as the run that it would be alone. `given` holds the fields that it sets itself.

    Raises pydantic's `ValidationError`.
    """
    top = run.model_dump(exclude={"jobs", "scheduler"})
    return RunConfig.model_validate(merge_job(top, JobConfig.model_validate(dict(given)).model_dump()))


def shared_fields(job: Mapping[str, Any]) -> list[KeyPath]:
    """Return the paths of the fields that a job sets although all jobs share them."""
    return [("train", key) for key in _mapping(job.get("train")) if key in (*SHARED, OTHER_NAME)]


def merge_job(top: Mapping[str, Any], job: Mapping[str, Any]) -> dict[str, Any]:
    """Return the run that a job would be alone, as plain values: the job's fields on top of the top level's.

    A section that is not a mapping counts as empty; validation reports it elsewhere.
    """
    sections = {name: {**_mapping(top.get(name)), **_mapping(job.get(name))} for name in SECTIONS}
    return {"base": top.get("base"), **_adapter(top.get("adapter"), job.get("adapter")), **sections}


def is_complete(adapter: Any) -> bool:
    """Whether an adapter is complete by itself; else it is None or only changes another."""
    return adapter is not None and not (isinstance(adapter, Mapping) and not {"kind", "preset"} & set(adapter))


def _adapter(top: Any, own: Any) -> dict[str, Any]:
    if is_complete(own) or top is None:
        found = own
    elif own is None:
        found = top
    else:
        found = {**_expand_name(top), **own}
    return {} if found is None else {"adapter": found}


def _expand_name(adapter: Any) -> dict[str, Any]:
    """Return the mapping that the name of a kind or of a preset stands for."""
    from graft.adapters.registry import kinds

    if isinstance(adapter, str):
        return {"kind" if adapter in kinds() else "preset": adapter}
    return dict(adapter) if isinstance(adapter, Mapping) else {"parts": adapter}


def _adapter_values(value: Any) -> Any:
    """Return an adapter as plain values: with all fields if it is complete, as written if it only changes another."""
    from graft.adapters.parsing import parse
    from graft.adapters.presets import Preset

    if not is_complete(value):
        return value
    parsed = parse(value)
    return {"preset": parsed.preset, **parsed.changes} if isinstance(parsed, Preset) else parsed.model_dump(mode="json")


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def _defaults(model: type[Section]) -> dict[str, Any]:
    """Return the defaults of all optional fields, as JSON values."""
    given = {name: field for name, field in model.model_fields.items() if not field.is_required()}
    values = {name: field.get_default(call_default_factory=True) for name, field in given.items()}
    return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}


class JobDocument(Document):
    """The merged values of one job. The place of each value is where the user wrote it: in the job, or at the top level."""

    def __init__(self, whole: Document, name: str) -> None:
        self.whole, self.job = whole, name
        self.own = _mapping(whole.data["jobs"].get(name))
        super().__init__(whole.name, merge_job(whole.data, self.own))

    def written(self, path: KeyPath) -> KeyPath:
        """Return the path in the whole document of a value of this job.

        With `jobs: {a: {train: {lr: 1e-3}}}`, train.lr of job a is written at jobs.a.train.lr, and train.epochs at train.epochs.
        """
        here: tuple[Key, ...] = ("jobs", self.job)
        if not path:
            return here
        own = self.own.get(str(path[0]))
        if path[0] == "adapter":
            inside = is_complete(own) or (isinstance(own, Mapping) and (len(path) == 1 or path[1] in own))
        else:
            inside = isinstance(own, Mapping) and len(path) > 1 and path[1] in own
        return (*here, *path) if inside else path

    def where(self, path: KeyPath) -> str:
        written = self.written(path)
        known = any(place[: len(written)] == written for place in self.whole.places)
        return self.whole.where(written if known else ("jobs", self.job))

    def as_typed(self, path: KeyPath) -> str:
        return dotted(self.written(path))

    @property
    def label(self) -> str:
        return f" of job '{self.job}'"

"""Build what a run is made of: the base and, for each job, its data and its adapter with optimiser and schedule.

All data are read before the base is loaded, so that a mistake in any job shows at once. A job's random numbers come from its own seed.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError

from graft.adapters.base import AdapterConfig
from graft.adapters.presets import Preset
from graft.attaching.active import set_active
from graft.attaching.attach import attach
from graft.attaching.bare import keep_context
from graft.bases import Base, load_base, load_tokenizer
from graft.bases.context import context_length
from graft.bases.heads import draw_head, with_head
from graft.bases.loading import check_device, dtype_of
from graft.bases.parts import load_in_parts
from graft.bases.tokens import refuse_unknown
from graft.bases.vocabulary import with_tokens
from graft.config import AnyRun, RunConfig, resolve_job
from graft.config.jobs import REFERENCE
from graft.data.preparing import Prepared
from graft.data.template import FILE as TEMPLATE_FILE
from graft.data.template import Template
from graft.data.templates import template_of
from graft.distributed.shares import Shares
from graft.errors import GraftError
from graft.formats.loading import load
from graft.injection.state import site_table_of, state_of
from graft.kernels import chosen
from graft.runs.folder import RunFolder
from graft.training.fitting import refuse_streaming
from graft.training.forward.activations import refuse_nothing_to_gain
from graft.training.job import Job
from graft.training.objectives import reference_of
from graft.training.offload import empty
from graft.training.out_of_memory import loading
from graft.training.reading import data_of
from graft.training.records.trackers import check_installed
from graft.training.trained_base import refuse_no_effect


@dataclass(frozen=True)
class JobParts:
    """One job and what it was made from."""

    config: RunConfig
    """The configuration of a run of this job alone."""
    data: Prepared
    job: Job


@dataclass(frozen=True)
class RunParts:
    """What a run is made of. Jobs that are submitted later are added to `members`."""

    config: AnyRun
    base: Base
    members: list[JobParts]
    shares: Shares = field(default_factory=Shares)
    """Who runs what."""

    @property
    def jobs(self) -> tuple[Job, ...]:
        """All jobs."""
        return tuple(part.job for part in self.members)

    @property
    def data(self) -> Prepared:
        """The data of the first job: all data, where the run has one job."""
        return self.members[0].data

    def of(self, job: Job) -> JobParts:
        """The parts that a job was made from."""
        return next(part for part in self.members if part.job is job)

    def alone(self, part: JobParts) -> RunParts:
        """The parts of a run of one job on this base."""
        return replace(self, config=part.config, members=[part])


def build(
    config: AnyRun, only: Collection[str] | None = None, begun: RunFolder | None = None, shares: Shares | None = None
) -> RunParts:
    """Read all data, load the base and make the jobs of a run.

    only: names of the jobs to make; all by default. begun: the folder of a run that is resumed. It has copies of the adapters that
    `train.init_from` named, which may be gone by now. shares: who runs what; this process, by default.
    """
    check_installed(config.common().loggers)
    refuse_streaming(config)
    each = {
        name: _without_origin(own, name, begun) for name, own in config.each().items() if only is None or name in only
    }
    # The tokenizer is enough to read the data. Jobs with the same settings share one prepared data set.
    tokenizer, first = load_tokenizer(config.base), next(iter(each.values()), None)
    task = first.data.base_task if first is not None else "causal"
    prepared: list[tuple[Any, Prepared]] = []
    data: dict[str, Prepared] = {}
    for name, own in each.items():
        with _named(name, len(each) > 1):
            found = next((made for settings, made in prepared if settings == own.data), None)
            data[name] = found or data_of(own, tokenizer, config, task, next(iter(data.values()), None))
            prepared.append((own.data, data[name]))
    with loading(config.base, task):
        base = _base(config, task, next(iter(data.values())).classes if data else (), shares)
    chosen(config.common().kernels, base.device)
    refuse_nothing_to_gain(config.common().activations, base.device)
    parts = RunParts(config, base, [], shares or Shares())
    parts.shares.settle([(name, weight(own, data[name])) for name, own in each.items()])
    for name, own in each.items():
        with _named(name, len(each) > 1):
            parts.members.append(part_of(base, name, own, data[name], begun, parts.shares))
            parts.members[-1].job.priority = config.priority(name)
    return parts


def _base(config: AnyRun, task: str, classes: Sequence[str], shares: Shares | None) -> Base:
    """Load the base; where ranks share it, each keeps its part. For a pipeline a dense one is read on the host, where its weights are
    mapped from the files, and goes to the device once it is cut into stages (`staging.py`)."""
    if shares is None or not shares.in_passes:
        return load_base(config.base, task, classes)
    if shares.mode == "fsdp2":
        return load_in_parts(config.base, task, shares.group.size)
    dtype = str(dtype_of(config.base.dtype, check_device(config.base.device))).removeprefix("torch.")
    read_on = "cpu" if config.base.quantize is None else config.base.device
    return load_base(config.base.model_copy(update={"device": read_on, "dtype": dtype}), task, classes)


def build_job(parts: RunParts, name: str, given: Mapping[str, Any], begun: RunFolder | None = None) -> Job:
    """Make a job that is submitted to a run, and add it to the run's parts.

    given: the job's own settings; the run's settings fill in the rest. begun: the folder of a run that is resumed.
    Raises `GraftError` for mistakes in the settings, the data or the adapter.
    """
    try:
        own = resolve_job(parts.config, given)
    except ValidationError as error:
        raise GraftError(f"job '{name}': {error}") from error
    whole = next((each for each in (*parts.members,) if each.config.train.method.parts is not None), None)
    if whole is not None or own.train.method.parts is not None:
        kind = (own if whole is None else whole.config).train.method.kind
        raise GraftError(f"job '{name}' cannot join: train.method {kind} trains the base itself, which jobs share")
    first = parts.members[0].data if parts.members else None
    data = data_of(own, parts.base.tokenizer, parts.config, parts.base.task, first)
    parts.shares.settle([(name, weight(own, data))])
    part = part_of(parts.base, name, own, data, begun, parts.shares)
    part.job.priority = int(given.get("priority", 0))
    parts.members.append(part)
    return part.job


@contextmanager
def _named(name: str, needed: bool) -> Iterator[None]:
    """Put the job's name before a mistake's message, where the run has several jobs."""
    try:
        yield
    except GraftError as error:
        if not needed:
            raise
        raise GraftError(f"job '{name}': {error}") from error


def weight(own: RunConfig, data: Prepared) -> float:
    """The mean tokens of a job's step, by which jobs are dealt to ranks."""
    return float(data.train.lengths.mean()) * min(own.train.batch_size, len(data.train))


def part_of(
    base: Base, name: str, own: RunConfig, data: Prepared, begun: RunFolder | None = None, shares: Shares | None = None
) -> JobParts:
    """Attach a job's adapter to the base and make the job. Where it lives on another rank, its tensors are empty here."""
    shares = shares or Shares()
    torch.manual_seed(own.train.seed)
    if own.adapter is None:
        draw_head(base.model, base.fresh, own.train.seed)
        keep_context(base.model)
    else:
        _attach(base, name, own)
    _refuse_too_long(base, None if own.adapter is None else name, data)
    for part in (data.train, data.validation):
        if part is not None and len(part):
            refuse_unknown(base.model, base.name, base.tokenizer, part.largest_id)
    if (note := _other_template(base, own, data)) is not None:
        data = replace(data, report=replace(data.report, notes=(*data.report.notes, note)))
    job = Job.make(base.model, name, own.train, data.train, data.validation, also=base.fresh)
    refuse_no_effect(base, job)
    if isinstance(data.template, Template):
        job.stop_ids = frozenset(data.template.stop_ids(base.tokenizer))
    job.reference = _reference(base, name, own, begun)
    job.here = shares.here(name)
    if not job.here:
        empty(job)
    return JobParts(own, data, job)


def _reference(base: Base, name: str, own: RunConfig, begun: RunFolder | None) -> str | None:
    """Attach the adapter that a job starts from a second time, frozen, where its objective compares with it; returns its name.

    None means that the job compares with the bare base, or with nothing.
    """
    if reference_of(own.train.objective) != "init" or own.train.init_from is None:
        return None
    kept = None if begun is None else begun.reference_dir(name)
    frozen = f"{name}{REFERENCE}"
    load(base.model, kept if kept is not None and kept.is_dir() else own.train.init_from, name=frozen)
    set_active(base.model, name)
    return frozen


def _without_origin(own: RunConfig, name: str, begun: RunFolder | None) -> RunConfig:
    """Let a resumed job start from its adapter in the run folder, since the one that `train.init_from` named may be gone."""
    if begun is None or own.train.init_from is None or name not in begun.adapters():
        return own
    train = own.train.model_copy(update={"init_from": str(begun.adapter_dir(name))})
    return own.model_copy(update={"train": train})


def _other_template(base: Base, own: RunConfig, data: Prepared) -> str | None:
    """A note where the adapter of `train.init_from` was trained with another template; else None."""
    origin = own.train.init_from
    if origin is None or not isinstance(data.template, Template) or not (Path(origin) / TEMPLATE_FILE).is_file():
        return None
    theirs = template_of(origin, base.tokenizer)
    if theirs.digest == data.template.digest:
        return None
    return (
        f"The adapter in {origin} was trained with template '{theirs.name}', but this run renders with '{data.template.name}'. To go on "
        f"with the adapter's own, set data.template to {origin}."
    )


def _refuse_too_long(base: Base, name: str | None, data: Prepared) -> None:
    """Raise `GraftError` for samples that are longer than the base's context. Some bases would fail there, others compute nonsense."""
    room = context_length(base.model, name)
    longest = max(int(part.widths.max()) for part in (data.train, data.validation) if part is not None and len(part))
    if room is not None and longest > room:
        raise GraftError(
            f"the longest sample has {longest} tokens, but {base.name} has room for {room}{' with this adapter' if name else ''}: set "
            "data.max_length "
            f"to {room} and data.overlong to drop or truncate_prompt"
        )


def _attach(base: Base, name: str, config: RunConfig) -> None:
    """Attach a job's adapter: a fresh one, or the one of `train.init_from`, which must have the configuration that `adapter` says.

    A base without a trained head gets a fresh one, which is part of the adapter.
    """
    model = base.model
    assert config.adapter is not None
    draw_head(model, base.fresh, config.train.seed)
    adapter = with_tokens(model, with_head(model, config.adapter, base.fresh), base.added)
    if isinstance(adapter, AdapterConfig):
        adapter = adapter.tokenised(base.tokenizer)
    if config.train.init_from is None:
        attach(model, {name: adapter})
        return
    wanted = adapter.resolve(site_table_of(model).names()) if isinstance(adapter, Preset) else adapter
    load(model, config.train.init_from, name=name, any_base=config.train.any_base, resize=config.base.resize == "auto")
    found, given = (each.collapsed().model_dump() for each in (state_of(model).adapter(name).config, wanted))
    differing = [
        f"{key} {found.get(key)} there, {given.get(key)} here"
        for key in {**found, **given}
        if found.get(key) != given.get(key)
    ]
    if differing:
        raise GraftError(
            f"train.init_from: the adapter in {config.train.init_from} is not what `adapter` says: {'; '.join(differing)}. Give `adapter` "
            "the values that are there, or train a fresh adapter without train.init_from"
        )
    set_active(model, name)

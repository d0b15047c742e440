"""Begin a run: `train`, what a run leaves before its first step, and what it announces."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

from graft.attaching.saving import save
from graft.bases import pad_id
from graft.bases.quantised import quantised
from graft.config import AnyRun, RunConfig, local_paths
from graft.data.inspect import LEARNT, coloured, learnt_text, pieces
from graft.data.samples import Example
from graft.distributed.group import together
from graft.distributed.sharded import streamed
from graft.errors import GraftError, counted
from graft.runs.folder import RunFolder
from graft.training.answering import Judge, scores_of_answers
from graft.training.assembly import JobParts, RunParts, build, build_job
from graft.training.engine import Engine
from graft.training.job import Job
from graft.training.objectives import reference_of
from graft.training.out_of_memory import named
from graft.training.publishing import publish
from graft.training.records.progress import Reporter
from graft.training.records.trackers import trackers
from graft.training.settings import Settings
from graft.training.staging import divide
from graft.training.trained_base import rounding_note, trained_summary
from graft.training.world import check_alike, check_shared, folder_of, shares_of
from graft.utils.streams import outlasting


def train(
    config: AnyRun, out: str | Path, *, overwrite: bool = False, force: bool = False, quiet: bool = False,
    judge: Judge | None = None,
) -> RunFolder:  # fmt: skip
    """Train what a configuration describes, in a run folder that is new or empty (or replaced, with `overwrite`).

    A mistake in base, data or adapters leaves the folder as it was. Ctrl-C saves and returns; status.json then says "stopped". force: go
    on where the file system cannot say whether another process trains there. judge: for `train.answers`.

    Raises `GraftError` for the user's mistakes and, in a run of one job, for a loss that is not finite. Among several jobs, the one that
    fails is noted in status.json, and the others go on.
    """
    with together() as group, ExitStack() as claimed:
        group.wait_at_most(config.distributed.timeout)
        folder = folder_of(group, out)
        with group.agreed():
            _refuse_own_base(config, folder)
            folder.check_vacant(overwrite)  # touches nothing, which a claim would
            claimed.enter_context(folder.claim(force))
            folder.check_vacant(overwrite)  # again, since another process may have trained there until now
        shares, said = shares_of(config, group)
        with group.agreed():
            parts = build(config, shares=shares)
        check_alike(parts, group)
        parts = divide(parts)
        with group.agreed():
            folder.create(overwrite)
        with failure_noted(folder):
            with group.agreed(), folder.beginning():
                write_facts(parts, folder)
                folder.write_config(config)
            folder.status({"state": "running", "step": 0, "jobs": {}})
            check_shared(folder, group)
            with group.agreed():
                write_beginning(parts, folder)
            run_parts(parts, folder, None, quiet or not group.leads, judge, said)
    return folder


def _refuse_own_base(config: AnyRun, folder: RunFolder) -> None:
    """Raise `GraftError` for a base that lies in the folder that the run would replace."""
    base = Path(config.base.model).expanduser()
    if base.is_dir() and folder.path.exists() and base.resolve().is_relative_to(folder.path.resolve()):
        raise GraftError(
            f"base.model {base} lies in {folder.path}, which the run would replace: name another folder with --out"
        )


def write_facts(parts: RunParts, folder: RunFolder) -> None:
    """Write lock.json, by which the folder is known as a run's."""
    data = {part.job.name: part.data for part in parts.members}
    folder.lock(
        paths=local_paths(parts.config.model_dump(mode="json")),
        base=parts.base.identity,
        data=_one_or_each({name: each.train.digest for name, each in data.items()}),
        template=_one_or_each({name: each.template.digest for name, each in data.items()}),
    )


def write_beginning(parts: RunParts, folder: RunFolder) -> None:
    """Write what a run leaves before its first step."""
    for part in parts.members:
        _write_samples(folder, part, parts.base.tokenizer)
        _keep_reference(folder, parts, part.job)


@contextmanager
def failure_noted(folder: RunFolder) -> Iterator[None]:
    """Note in status.json whatever ends a block of code, where the engine has not. A folder that is gone is named."""
    try:
        yield
    except BaseException as error:
        if isinstance(error, OSError) and not folder.config_path.exists():
            raise GraftError(f"the run folder {folder.path} was moved or deleted while its run trained") from error
        status = folder.last_status()
        if status.get("state") in (None, "running") and folder.config_path.exists():
            step, jobs, said = status.get("step", 0), status.get("jobs", {}), str(error) or type(error).__name__
            with suppress(GraftError, OSError):  # the error itself matters more
                folder.status({"state": "failed", "step": step, "jobs": jobs, "error": said})
        raise


def _one_or_each(values: dict[str, str]) -> str | dict[str, str]:
    return next(iter(values.values())) if len(values) == 1 else values


def run_parts(
    parts: RunParts, folder: RunFolder, checkpoint: int | None, quiet: bool, judge: Judge | None = None,
    said: str | None = None,
) -> None:  # fmt: skip
    """Train these parts to the end, from the start or from a checkpoint. said: how the run is dealt to its ranks."""
    config, common = parts.config, parts.config.common()
    settings = Settings(
        pad_id=pad_id(parts.base.tokenizer, parts.base.model),
        token_budget=common.token_budget,
        layout=common.layout,
        activations=common.activations,
        compile="inductor" if common.compile else None,
        kernels=common.kernels,
        base_dropout=config.base.dropout,
        save_every=common.save_every,
        keep=common.keep,
        log_every=common.log_every,
        scheduler=config.scheduler,
    )
    reporter = Reporter(sum(job.steps for job in parts.jobs), quiet=quiet)
    engine = Engine(
        parts.base.model,
        parts.jobs,
        folder,
        settings,
        reporter,
        lambda done: publish(parts, folder, done, engine.recorder.losses.get(done.name), engine.layout),
        trackers(common.loggers, folder.path, config.model_dump(mode="json")) if parts.shares.group.leads else (),
        (lambda name, given: _submitted(parts, folder, name, given)) if parts.shares.takes_jobs else None,
        lambda job: scores_of_answers(parts, job, judge),
        parts.shares,
    )
    for job in parts.jobs:
        job.trainable.begin(job.optimizer)
    with outlasting(), named():
        if said is not None:
            reporter.say(said)
        for part in parts.members:
            _announce(parts, part, folder, reporter, checkpoint)
        engine.run(checkpoint)


def _submitted(parts: RunParts, folder: RunFolder, name: str, given: Mapping[str, Any]) -> Job:
    """Make a job that is submitted to the run, with its files in the run folder."""
    job = build_job(parts, name, folder.located(given))
    _write_samples(folder, parts.of(job), parts.base.tokenizer)
    _keep_reference(folder, parts, job)
    return job


def _keep_reference(folder: RunFolder, parts: RunParts, job: Job) -> None:
    """Save the adapter that a job compares with as references/<name>, since the one of train.init_from may change before a resume."""
    if job.reference is not None and parts.shares.writes(job.name):
        save(parts.base.model, job.reference, folder.reference_dir(job.name))


def _announce(parts: RunParts, part: JobParts, folder: RunFolder, reporter: Reporter, checkpoint: int | None) -> None:
    """Say what a job is: one line with sizes, notes and, in a terminal, the table of sites and a coloured sample."""
    job, data = part.job, part.data.report
    count = job.trainable.count
    held = f", {data.validation.samples:,} held out" if data.validation else ""
    reporter.say(
        f"{folder.path}: '{job.name}' with {counted(count, 'parameter')} on {parts.base.name} ({parts.base.device}, "
        f"{str(parts.base.dtype).removeprefix('torch.')}); {counted(data.train.samples, 'sample')}{held}, "
        f"{data.learnt}; {counted(job.steps, 'step')}"
        + (f", from {'run ' * (len(parts.members) > 1)}step {checkpoint}" if checkpoint else "")
    )
    if part is parts.members[0] and (held := quantised(parts.base.model)) is not None:
        reporter.say(f"The base holds {held}" + (f"; {held.kept_note}" if held.kept_note is not None else ""))
    if part is parts.members[0] and (blocks := streamed(parts.base.model)) is not None:
        reporter.say(f"The base's blocks stream: {blocks}")
    for note in (reference_note(part.config), rounding_note(parts.base, job)):
        if note is not None:
            reporter.say(note)
    if reporter.live and not checkpoint and len(parts.members) == 1:
        reporter.show(str(trained_summary(parts.base.model, job)), data, f"Sample 1, trained on where it is {LEARNT}:")
        reporter.show(coloured(part.data.train[0], parts.base.tokenizer, classes=part.data.classes))
        return
    for note in (*data.left_out, *data.notes):
        reporter.say(note)


def reference_note(config: RunConfig) -> str | None:
    """A note where a job's answers are compared with another adapter than it starts from; else None."""
    if config.train.init_from is None or reference_of(config.train.objective) != "base":
        return None
    return (
        f"The adapter starts from {config.train.init_from}, but its answers are compared with the bare base, so rewards do not start "
        "at zero. To compare with the adapter that it starts from, set train.objective.reference to init."
    )


def _second_answer(example: Example, tokenizer: Any) -> dict[str, Any]:
    """The rejected answer of a pair, or the mark of an answer that has one."""
    if example.desirable is not None:
        return {"desirable": example.desirable}
    return {} if example.rejected is None else {"rejected": learnt_text(example.rejected, tokenizer)}


def _write_samples(folder: RunFolder, part: JobParts, tokenizer: Any) -> None:
    """Write the first three samples of a job to samples.jsonl, as the model sees them and with what is trained on."""
    folder.samples.keep(lambda line: line["job"] != part.job.name)  # of the same job, before the run was resumed
    for index in range(min(3, len(part.data.train))):
        example = part.data.train[index]
        folder.samples.append(
            {
                "job": part.job.name,
                "source": example.source,
                "row": example.row,
                "text": tokenizer.decode(example.input_ids),
                "trained_on": learnt_text(example, tokenizer, part.data.classes),
                "pieces": pieces(example, tokenizer, part.data.classes),
                "tokens": len(example),
                "targets": example.num_targets,
                **_second_answer(example, tokenizer),
            }
        )

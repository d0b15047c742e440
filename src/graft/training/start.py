"""Begin a run and resume one: `train` and `resume`, what they announce, and the adapter folders that they write."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from graft.attaching.saving import save
from graft.attaching.summary import summary
from graft.bases import pad_id
from graft.config import AnyRun, RunConfig
from graft.data.inspect import LEARNT, coloured, learnt_text
from graft.errors import GraftError
from graft.kernels import chosen
from graft.runs.commands import CommandQueue
from graft.runs.folder import RunFolder
from graft.training.assembly import JobParts, RunParts, build, build_job
from graft.training.checkpoints import read_state, tidy
from graft.training.engine import Engine
from graft.training.job import Job
from graft.training.objectives import reference_of
from graft.training.publishing import publish
from graft.training.records.progress import Reporter
from graft.training.records.trackers import check_installed, trackers
from graft.training.settings import Settings


def train(config: AnyRun, out: str | Path, *, overwrite: bool = False, quiet: bool = False) -> RunFolder:
    """Train what a configuration describes, in a run folder that does not exist yet (or is replaced, with `overwrite`).

    The folder is made after base, data and adapters, so a mistake in them leaves no folder. Ctrl-C saves and returns; status.json then
    says "stopped".

    Raises `GraftError` for the user's mistakes and, in a run of one job, for a loss that is not finite. Among several jobs, the one that
    fails is noted in status.json, and the others go on.
    """
    folder = RunFolder(out)
    if folder.path.exists() and not overwrite:
        folder.create()  # refuse before anything is loaded
    parts = build(config)
    check_installed(config.common().loggers)
    chosen(config.common().kernels, parts.base.device)
    folder.create(overwrite)
    folder.write_config(config)
    data = {part.job.name: part.data for part in parts.members}
    folder.lock(
        base=parts.base.identity,
        data=_one_or_each({name: each.train.digest for name, each in data.items()}),
        template=_one_or_each({name: each.template.digest for name, each in data.items()}),
    )
    for part in parts.members:
        _write_samples(folder, part, parts.base.tokenizer)
        _keep_reference(folder, parts, part.job)
    _run(parts, folder, None, quiet)
    return folder


def resume(run: RunFolder | str | Path, *, quiet: bool = False) -> RunFolder:
    """Continue a run from its last checkpoint; a run that was killed before its first checkpoint begins again.

    Metrics from after the checkpoint are removed, since the steps are taken again, on a CPU with the same numbers bit for bit.
    Raises `GraftError` for a folder without a run, a run that is still running, and data that changed since.
    """
    folder = (run if isinstance(run, RunFolder) else RunFolder(run)).existing()
    ended = folder.read_status().get("state")
    if ended == "running":
        raise GraftError(f"the run in {folder.path} is still running")
    config, queue = folder.config, CommandQueue(folder.path)
    tidy(folder)
    steps = folder.checkpoints()
    if ended == "finished" and steps and folder.adapters() and not queue.pending():
        Reporter(0, quiet=quiet).say(f"The run in {folder.path} is finished: there is nothing to resume.")
        return folder
    last = steps[-1] if steps else 0
    if not last:
        parts = build(config, begun=folder)
    else:
        state = read_state(folder, last)
        parts = build(config, state["jobs"], folder)
        # The configuration names the jobs of the beginning; those submitted later are in the journal of commands.
        for command in queue.journal.read()[: state["orders"]]:
            if command["do"] == "submit" and command["job"] in state["jobs"]:
                build_job(parts, command["job"], command["config"], folder)
    folder.metrics.keep(lambda line: line["step"] <= last)
    _run(parts, folder, last or None, quiet)
    return folder


def _one_or_each(values: dict[str, str]) -> str | dict[str, str]:
    return next(iter(values.values())) if len(values) == 1 else values


def _run(parts: RunParts, folder: RunFolder, checkpoint: int | None, quiet: bool) -> None:
    """Train these parts to the end, from the start or from a checkpoint."""
    config, common = parts.config, parts.config.common()
    settings = Settings(
        pad_id=pad_id(parts.base.tokenizer, parts.base.model),
        token_budget=common.token_budget,
        layout=common.layout,
        gradient_checkpointing=common.gradient_checkpointing,
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
        trackers(common.loggers, folder.path, config.model_dump(mode="json")),
        lambda name, given: _submitted(parts, folder, name, given),
    )
    for part in parts.members:
        _announce(parts, part, folder, reporter, checkpoint)
    engine.run(checkpoint)


def _submitted(parts: RunParts, folder: RunFolder, name: str, given: Mapping[str, Any]) -> Job:
    """Make a job that is submitted to the run, with its files in the run folder."""
    job = build_job(parts, name, given)
    _write_samples(folder, parts.of(job), parts.base.tokenizer)
    _keep_reference(folder, parts, job)
    return job


def _keep_reference(folder: RunFolder, parts: RunParts, job: Job) -> None:
    """Save the adapter that a job compares with as references/<name>, since the one of train.init_from may change before a resume."""
    if job.reference is not None:
        save(parts.base.model, job.reference, folder.reference_dir(job.name))


def _announce(parts: RunParts, part: JobParts, folder: RunFolder, reporter: Reporter, checkpoint: int | None) -> None:
    """Say what a job is: one line with sizes, notes and, in a terminal, the table of sites and a coloured sample."""
    job, data = part.job, part.data.report
    count = sum(parameter.numel() for parameter in job.params.values())
    held = f", {data.validation.samples:,} held out" if data.validation else ""
    reporter.say(
        f"{folder.path}: '{job.name}' with {count:,} parameters on {parts.base.name} ({parts.base.device}, "
        f"{str(parts.base.dtype).removeprefix('torch.')}); {data.train.samples:,} samples{held}, "
        f"{data.learnt}; {job.steps:,} steps" + (f", from step {checkpoint}" if checkpoint else "")
    )
    if (note := reference_note(part.config)) is not None:
        reporter.say(note)
    if reporter.live and not checkpoint and len(parts.members) == 1:
        reporter.show(str(summary(parts.base.model)), data, f"Sample 1, trained on where it is {LEARNT}:")
        reporter.show(coloured(part.data.train[0], parts.base.tokenizer, classes=part.data.classes))
        return
    for note in data.notes:
        reporter.say(note)


def reference_note(config: RunConfig) -> str | None:
    """A note where a job's answers are compared with another adapter than it starts from; else None."""
    if config.train.init_from is None or reference_of(config.train.objective) != "base":
        return None
    return (
        f"The adapter starts from {config.train.init_from}, but its answers are compared with the bare base, so rewards do not start "
        "at zero. To compare with the adapter that it starts from, set train.objective.reference to init."
    )


def _write_samples(folder: RunFolder, part: JobParts, tokenizer: Any) -> None:
    """Append the first three samples to samples.jsonl, as the model sees them and with what is trained on."""
    for index in range(min(3, len(part.data.train))):
        example = part.data.train[index]
        folder.samples.append(
            {
                "job": part.job.name,
                "source": example.source,
                "row": example.row,
                "text": tokenizer.decode(example.input_ids),
                "trained_on": learnt_text(example, tokenizer, part.data.classes),
                "tokens": len(example),
                "targets": example.num_targets,
                **({"rejected": learnt_text(example.rejected, tokenizer)} if example.rejected is not None else {}),
            }
        )

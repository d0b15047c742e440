"""Resume a run: from its last checkpoint that is whole, on the same base and data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from graft.attaching.fingerprint import other_base
from graft.config import AnyRun
from graft.config.document import dotted, in_section, parse_change
from graft.distributed.group import Group, together
from graft.errors import GraftError, listed
from graft.injection.state import state_of
from graft.runs.commands import CommandQueue
from graft.runs.contents import is_run
from graft.runs.folder import RunFolder
from graft.training.answering import Judge
from graft.training.assembly import RunParts, build, build_job
from graft.training.checkpoints import newest, read_state, tidy
from graft.training.records.progress import Reporter
from graft.training.staging import divide
from graft.training.start import failure_noted, run_parts, write_beginning
from graft.training.world import check_alike, folder_of, shares_of

LENGTHS = ("train.steps", "train.epochs")
"""Settings that make a run longer, also one that is finished."""
CHANGEABLE = (
    "base.model", "base.device", "base.offload", "data.train", "data.validation", "train.save_every", "train.keep", "train.log_every",
    "train.loggers", "distributed",
    *LENGTHS,
)  # fmt: skip
"""Settings that may change when a run is resumed: where base and data are, which have to be the same, what is written, how the run is dealt
to processes, and the length."""
CONSTANT = ("constant", "constant_with_warmup")
"""Schedules that do not depend on the length."""


def resume(
    run: RunFolder | str | Path, changes: Sequence[str] = (), *, force: bool = False, quiet: bool = False,
    judge: Judge | None = None,
) -> RunFolder:  # fmt: skip
    """Continue a run from its last checkpoint; a run that was killed before its first checkpoint begins again.

    Metrics from after the checkpoint are removed, since the steps are taken again, on a CPU with the same numbers bit for bit. If the
    last checkpoint is damaged, the run continues from the one before. changes: `key=value`, for the settings in `CHANGEABLE`; they are
    kept. force, judge: as in `train`.
    Raises `GraftError` for a folder without a run, a run that is still running, files that are missing, and a base or data that changed.
    """
    with together() as group, ExitStack() as claimed:
        with group.agreed():
            folder = folder_of(group, run.path if isinstance(run, RunFolder) else run)
            _refuse_other(folder.existing())
            claimed.enter_context(folder.claim(force))
        with failure_noted(folder):
            _resume(folder, changes, quiet or not group.leads, judge, group)
    return folder


def _refuse_other(folder: RunFolder) -> None:
    if not is_run(folder.path):
        raise GraftError(
            f"{folder.path} is not a run folder: its config.yaml is no run's, for there is neither a lock.json nor a status.json of Graft"
        )


def _resume(folder: RunFolder, changes: Sequence[str], quiet: bool, judge: Judge | None, group: Group) -> None:
    reporter, queue = Reporter(0, quiet=quiet), CommandQueue(folder.path)
    with group.agreed():
        config = _changed(folder, changes)
        if group.leads:
            tidy(folder)
    group.wait_at_most(config.distributed.timeout)
    with group.agreed():
        done = not _named(changes, LENGTHS) and _is_done(folder, queue)
    if done:
        reporter.say(f"The run in {folder.path} is finished: there is nothing to resume.")
        return
    found: tuple[int | None, list[str]] = (None, [])
    with group.agreed():
        _refuse_missing(folder, config)
        if group.leads:
            found = newest(folder)
    last, notes = group.tell(found)
    for note in notes:
        reporter.say(note)
    shares, said = shares_of(config, group)
    with group.agreed():
        state = {"jobs": None, "orders": 0} if last is None else read_state(folder, last)
        parts = build(config, state["jobs"], folder, shares)
        _check_base(parts, folder)
        for note in _longer(parts, state["jobs"] or {}, folder):
            reporter.say(note)
        # The configuration names the jobs of the beginning; those submitted later are in the journal of commands.
        for command in queue.journal.read()[: state["orders"]]:
            if command["do"] == "submit" and command["job"] in state["jobs"]:
                build_job(parts, command["job"], folder.located(command["config"]), folder)
    check_alike(parts, group)
    parts = divide(parts)
    with group.agreed():
        if last is None:
            write_beginning(parts, folder)
        if changes:
            folder.rewrite_config(config)
        folder.metrics.keep(lambda line: line["step"] <= (last or 0))
    run_parts(parts, folder, last, quiet, judge, said)


def _refuse_missing(folder: RunFolder, config: AnyRun) -> None:
    if missing := folder.missing(config):
        raise GraftError(
            f"{folder.path} cannot be resumed: {listed(missing)} {'is' if len(missing) == 1 else 'are'} missing, here and where the run "
            f"was started ({folder.started_in()[-1]}). Put back what is missing, or say where it is now: graft resume {folder.path} "
            "base.model=... data.train=..."
        )


def _changed(folder: RunFolder, changes: Sequence[str]) -> AnyRun:
    """The run's configuration with changes on top. Raises `GraftError` for a change of anything but `CHANGEABLE`."""
    for text in changes:
        if not _named([text], CHANGEABLE):
            raise GraftError(
                f"'{text}': a run that goes on keeps its settings; only {', '.join(CHANGEABLE)} may change. For other settings, train a "
                "new run, with train.init_from if it is to start from this one's adapter"
            )
    return folder.configured(changes)


def _named(changes: Sequence[str], settings: Sequence[str]) -> bool:
    """Whether any of the changes is of one of these settings."""
    keys = [dotted(key for key in in_section(parse_change(text)[0]) if isinstance(key, str)) for text in changes]
    return any(f"{key}.".startswith(f"{setting}.") for key in keys for setting in settings)


def _longer(parts: RunParts, states: Mapping[str, Any], folder: RunFolder) -> list[str]:
    """Return what the new length of each job means, in a sentence. Raises `GraftError` for a run that would become shorter."""
    notes = []
    for job in parts.jobs:
        before, done = (states[job.name][key] if job.name in states else job.steps for key in ("steps", "step"))
        if job.steps < before:
            raise GraftError(
                f"{folder.path} cannot become shorter: '{job.name}' has {before} steps ({done} are taken), now {job.steps} are asked for"
            )
        if job.steps > before:
            schedule = job.config.schedule
            rate = (
                "the learning rate stays what it was, as in a run of this length"
                if schedule in CONSTANT and not isinstance(job.config.warmup, float)
                else f"from step {done + 1} on, the learning rate is that of the schedule '{schedule}' over {job.steps} steps, while the "
                f"steps before were taken with the schedule over {before}"
            )
            notes.append(f"'{job.name}' goes on to step {job.steps} instead of {before}: {rate}.")
    return notes


def _is_done(folder: RunFolder, queue: CommandQueue) -> bool:
    """Whether a run is finished, with nothing left to do. Raises `GraftError` for a run whose checkpoints were deleted: from its first step
    on it has some, and to begin again would replace what it has learnt."""
    finished, steps = folder.last_status().get("state") == "finished", folder.checkpoints()
    if finished and not queue.pending() and (folder.adapters() or folder.trained_model or not steps):
        return True
    taken = max((line["step"] for line in folder.metrics.read()), default=0)
    if not steps and (finished or taken > 1):
        raise GraftError(
            f"{folder.path} cannot be resumed: it took {taken} steps, but its checkpoints are gone. Train it again with --overwrite, or in "
            "a new folder"
        )
    return False


def _check_base(parts: RunParts, folder: RunFolder) -> None:
    """Raise `GraftError` if the base is not the one that lock.json says the run began with."""
    began = folder.facts().get("base")
    if began is None:
        return
    if (difference := other_base(began, parts.base.model, state_of(parts.base.model))) is not None:
        raise GraftError(
            f"{folder.path} cannot be resumed: its base, {parts.base.name}, has changed since it began: {difference}. Put the old base "
            "back, or start a new run with train.init_from"
        )

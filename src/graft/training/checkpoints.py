"""Checkpoints: everything that a run needs to continue as if it had never stopped, in a folder that is complete or absent.

    checkpoints/<step>/state.json               layout; per job: position, schedule, best, counters of early stopping; the scheduler
                       <job>.safetensors        the adapter (or the base's parameters) as it trains, and its optimiser's moments
                       rng.safetensors          torch's generators
    checkpoints/last.json  best.json            pointers to steps
                <step>.damaged/                 a checkpoint that could not be read when the run was resumed

A folder is written under a temporary name, flushed to the disk and renamed. Nothing is ever unpickled.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from graft.distributed.shares import Shares
from graft.errors import GraftError
from graft.runs.contents import delete_unfinished
from graft.runs.folder import RunFolder
from graft.training.job import Job
from graft.training.tensor_files import each_tensor, load_tensors, save_tensors
from graft.utils.clock import timed
from graft.utils.files import new_dir, write_json_atomic
from graft.utils.jsonl import read_json

ADAPTER, OPTIMISER = "adapter/", "optimiser/"


@timed("checkpoints")
def save_checkpoint(
    folder: RunFolder, jobs: Sequence[Job], step: int, layout: str, keep: int, shares: Shares | None = None, **more: Any
) -> Path:  # fmt: skip
    """Write the state after `step` steps, point last.json to it, and remove the oldest checkpoints beyond `keep`, but never a best one.

    more: further entries of state.json. The file of an offloaded job is linked, not written again. Every rank calls this: each writes
    the jobs that are its own, into the folder that the first rank makes.
    """
    path, shares = folder.checkpoint_dir(step), shares or Shares()
    own, group = [job for job in jobs if shares.writes(job.name)], shares.group
    if not group.leads:
        fresh = Path(group.tell(""))
        with group.agreed():
            _write_jobs(folder, own, fresh)
        group.wait()
        return path
    with new_dir(path) as fresh:
        group.tell(str(fresh.resolve()))
        with group.agreed():
            _write_jobs(folder, own, fresh)
        save_tensors(_generators(), fresh / "rng.safetensors")
        state = {"step": step, "layout": layout, **more, "jobs": {job.name: job.state() for job in jobs}}
        write_json_atomic(fresh / "state.json", state)
    write_json_atomic(path.parent / "last.json", {"step": step})
    best = {job.name: job.best for job in jobs if job.best is not None}
    if best:
        write_json_atomic(path.parent / "best.json", best)
    _prune(folder, jobs, keep)
    group.wait()
    return path


def _write_jobs(folder: RunFolder, jobs: Sequence[Job], into: Path) -> None:
    for job in jobs:
        if job.resident:
            write_job(job, into / f"{job.name}.safetensors")
        else:
            link(offloaded(folder, job), into / f"{job.name}.safetensors")


def write_job(job: Job, path: Path) -> None:
    """Write all tensors of a job: what it trains, as it is, and the optimiser's moments."""
    tensors = {ADAPTER + name: tensor for name, tensor in job.trainable.state().items()}
    tensors |= {OPTIMISER + name: tensor for name, tensor in job.tensors().items()}
    save_tensors(tensors, path)


def offload_dir(folder: RunFolder) -> Path:
    """Folder of the jobs that are offloaded."""
    return folder.path / "aside"


def offloaded(folder: RunFolder, job: Job) -> Path:
    """File of the tensors of a job that is offloaded."""
    return offload_dir(folder) / f"{job.name}.safetensors"


def link(source: Path, target: Path) -> None:
    """Give a file a second name by a hard link, or copy it where the file system has none."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


@timed("checkpoints")
def verify_checkpoint(path: Path, jobs: Sequence[Job]) -> None:
    """Read a checkpoint back and compare what jobs train with what is in memory. Raises `GraftError` that names the tensor that differs."""
    for job in jobs:
        wanted = {ADAPTER + name: tensor for name, tensor in job.trainable.state().items()}
        for key, stored in each_tensor(path / f"{job.name}.safetensors"):
            if (tensor := wanted.pop(key, None)) is not None and not torch.equal(stored, tensor.cpu()):
                name = key.removeprefix(ADAPTER)
                if not bool(torch.isfinite(tensor).all()):
                    raise GraftError(
                        f"'{name}' of '{job.name}' became infinite or not a number: lower train.lr or train.weight_decay. The checkpoint "
                        "before is whole"
                    )
                raise GraftError(
                    f"the checkpoint {path} does not hold what was written: '{name}' of '{job.name}' differs. Check the disk"
                )
        assert not wanted


def read_state(folder: RunFolder, step: int) -> dict[str, Any]:
    """Read state.json of a checkpoint. Raises `GraftError` if it is missing or damaged."""
    path = folder.checkpoint_dir(step) / "state.json"
    try:
        return read_json(path)
    except OSError as error:
        raise GraftError(f"{path} cannot be read ({error.strerror})") from error


def restore_checkpoint(folder: RunFolder, jobs: Sequence[Job], step: int) -> dict[str, Any]:
    """Load jobs, with what they train, and random generators from a checkpoint; returns its state.json.

    Raises `GraftError` where the checkpoint has no such job, or where the job's data changed since.
    """
    path, state = folder.checkpoint_dir(step), read_state(folder, step)
    for job in jobs:
        own = state["jobs"].get(job.name)
        if own is None:
            raise GraftError(
                f"{folder.path} cannot be resumed: it has no job '{job.name}'. Its jobs: {', '.join(state['jobs'])}"
            )
        if own["data"] != job.train.digest:
            raise GraftError(
                f"{folder.path} cannot be resumed: the data of '{job.name}' changed since (then {own['data']}, now {job.train.digest}). "
                "Undo the change, or start a new run with train.init_from"
            )
        stored = load_tensors(path / f"{job.name}.safetensors") if job.here else {}
        if job.here:
            job.trainable.restore(with_prefix(stored, ADAPTER))
        job.restore(own, with_prefix(stored, OPTIMISER))
    _set_generators(load_tensors(path / "rng.safetensors"))
    return state


@timed("checkpoints")
def restore_trained(folder: RunFolder, job: Job, step: int) -> None:
    """Load what one job trains from a checkpoint."""
    path = folder.checkpoint_dir(step) / f"{job.name}.safetensors"
    own = {key: each.clone() for key, each in each_tensor(path) if key.startswith(ADAPTER)}
    job.trainable.restore(with_prefix(own, ADAPTER))


def newest(folder: RunFolder) -> tuple[int | None, list[str]]:
    """Return the step of the newest checkpoint that is whole, and a sentence for each newer one, which is renamed to <step>.damaged.

    Without any checkpoint the step is None. Raises `GraftError`, and renames nothing, if there are checkpoints but none is whole.
    """
    damaged: dict[int, str] = {}
    for step in reversed(folder.checkpoints()):
        try:
            _check(folder, step)
        except GraftError as error:
            damaged[step] = str(error)
            continue
        for other in damaged:
            path = folder.checkpoint_dir(other)
            path.rename(path.with_name(f"{path.name}.damaged"))
        return step, [
            f"Checkpoint {other} is damaged: {reason}. The run goes on from step {step}."
            for other, reason in damaged.items()
        ]
    if damaged:
        reasons = "; ".join(f"{step}: {reason}" for step, reason in damaged.items())
        raise GraftError(
            f"{folder.path} cannot be resumed, because none of its checkpoints can be read ({reasons}). Train it again with --overwrite"
        )
    return None, []


def _check(folder: RunFolder, step: int) -> None:
    """Raise `GraftError` unless all files of a checkpoint, and those of the best weights that it points to, are there and whole."""
    path, state = folder.checkpoint_dir(step), read_state(folder, step)
    lacking = [key for key in ("step", "layout", "jobs", "orders", "losses") if key not in state]
    if lacking:
        raise GraftError(f"{path / 'state.json'} has no {', '.join(lacking)}")
    load_tensors(path / "rng.safetensors")
    for name, job in state["jobs"].items():
        for at in {step, job.get("best_at") or step}:
            for _ in each_tensor(folder.checkpoint_dir(at) / f"{name}.safetensors"):
                pass  # a damaged one raises


def tidy(folder: RunFolder) -> None:
    """Remove what a killed process left: half-written files, and the jobs that it had offloaded, which are in the checkpoint too."""
    delete_unfinished(folder.path)
    shutil.rmtree(offload_dir(folder), ignore_errors=True)


def with_prefix(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Select the tensors with this prefix, and remove it from their names."""
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def _generators() -> dict[str, Tensor]:
    states = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        states |= {f"cuda{index}": state for index, state in enumerate(torch.cuda.get_rng_state_all())}
    return states


def _set_generators(states: Mapping[str, Tensor]) -> None:
    torch.set_rng_state(states["cpu"])
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            if f"cuda{index}" in states:
                torch.cuda.set_rng_state(states[f"cuda{index}"], index)


def _prune(folder: RunFolder, jobs: Sequence[Job], keep: int) -> None:
    best = {job.best_at for job in jobs}
    for step in folder.checkpoints()[:-keep]:
        if step not in best:
            path = folder.checkpoint_dir(step)
            doomed = path.rename(path.with_name(f".{path.name}.old"))  # so that no reader finds half a folder
            shutil.rmtree(doomed)

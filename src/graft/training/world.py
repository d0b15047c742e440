"""How a run is dealt to its ranks: the mode, why it was chosen, and what does not go with it."""

from __future__ import annotations

import platform
from typing import Any

import torch
import transformers

from graft.bases.loading import check_device
from graft.bases.skeleton import load_skeleton
from graft.config import AnyRun
from graft.distributed.group import Group
from graft.distributed.shares import Mode, Shares
from graft.errors import GraftError, counted
from graft.runs.folder import RunFolder
from graft.runs.onlooker import Onlooker
from graft.training.assembly import RunParts
from graft.training.fitting import refuse_in_parts, refuse_in_stages
from graft.training.out_of_memory import BITS, floating_weights
from graft.training.scheduling.memory import room
from graft.utils import launched
from graft.version import __version__

ROOM = 0.6
"""Share of a rank's memory that a whole base may take in mode auto: the rest is for adapters and activations."""
UPDATES = {"in_backward": "full with update: in_backward", "stack": "qft"}
"""Rules of stepping whose gradients never lie together, so that ranks cannot sum them, as `train.method` names them."""


def folder_of(group: Group, path: Any) -> RunFolder:
    """The run folder as this rank sees it: the first rank writes it."""
    return RunFolder(path) if group.leads else Onlooker(path)


def check_shared(folder: RunFolder, group: Group) -> None:
    """Raise `GraftError` if a rank does not see the folder that the first one writes."""
    with group.agreed():
        if not folder.config_path.is_file():
            raise GraftError(
                f"process {group.rank} does not see {folder.path}, which process 0 writes: all need one shared folder"
            )


def shares_of(config: AnyRun, group: Group) -> tuple[Shares, str | None]:
    """Choose how a run is dealt to these ranks; what to say of it, or None for one process.

    Raises `GraftError` for what the mode, or several processes, do not go with.
    """
    wanted = config.distributed.mode
    with group.agreed():
        if group.size == 1 and wanted in ("spread", "ddp", "fsdp2", "pipeline"):
            raise GraftError(
                f"distributed.mode is {wanted}, but there is one process: start several with --processes N or torchrun, or set auto"
            )
        if group.size > 1 and wanted == "single":
            raise GraftError(
                f"distributed.mode is single, but {group.size} processes were started: start one, or set auto"
            )
    if group.size == 1:
        return Shares(group), None
    streams = config.base.offload is not None  # and so fits
    fits = _room(config, group) if wanted == "auto" and not streams else (0.0, None)
    with group.agreed():
        mode, why = _chosen(config, group, *fits) if wanted == "auto" else (wanted, "as distributed.mode says")
        if mode == "spread":
            _refuse_unspread(config, group)
        elif mode == "pipeline":
            refuse_in_stages(config, group.size)
        else:
            _refuse_unshared(config, group)
        if mode == "fsdp2":
            refuse_in_parts(config)
        if config.base.dropout:
            raise GraftError("base.dropout draws from one generator, so it needs one process: remove it, or start one")
    return Shares(group, mode), f"{group.size} processes, {mode}: {why}"


def _refuse_unshared(config: AnyRun, group: Group) -> None:
    for name, own in config.each().items():
        if own.train.method.rule in UPDATES:
            raise GraftError(
                f"train.method {UPDATES[own.train.method.rule]} of '{name}' never has its whole gradient at once, so {group.size} "
                "processes cannot sum it: run it in one process"
            )
    rows = sum(own.train.batch_size for own in config.each().values())
    if rows < group.size:
        raise GraftError(
            f"a step has {counted(rows, 'sample')}, fewer than the {group.size} processes: raise train.batch_size, or start fewer"
        )


def _refuse_unspread(config: AnyRun, group: Group) -> None:
    if (jobs := len(config.each())) < group.size:
        raise GraftError(
            f"distributed.mode is spread, but the run has {counted(jobs, 'job')} for {group.size} processes: each job lives on one. Set "
            "auto or ddp, or start fewer"
        )
    if config.scheduler.memory is not None:
        raise GraftError("scheduler.memory does not go with distributed.mode spread: set scheduler.resident, or ddp")


def _room(config: AnyRun, group: Group) -> tuple[float, float | None]:
    """Bytes of the base, and the least that any rank has room for; None where a system does not say."""
    with group.agreed():
        device, weight = check_device(config.base.device), _base_bytes(config)
        there, sharing = room(device), 1 if device.type == "cuda" else launched.local_size()
    found = group.gather(-1.0 if there is None else there / sharing)
    return weight, None if min(found) < 0 else min(found)


def _chosen(config: AnyRun, group: Group, weight: float, least: float | None) -> tuple[Mode, str]:
    """The mode of auto, and why."""
    jobs = len(config.each())
    if least is not None and weight > ROOM * least:
        return "fsdp2", f"the base takes {weight / 1e9:.1f} GB, and a process has {least / 1e9:.1f} GB"
    if jobs >= group.size and config.scheduler.memory is None:
        return "spread", f"{counted(jobs, 'job')}, each on one process, and the base fits"
    return "ddp", f"the base fits, and there {'is' if jobs == 1 else 'are'} {counted(jobs, 'job')}"


def _base_bytes(config: AnyRun) -> float:
    """Bytes of the base's weights as it will be loaded."""
    first = next(iter(config.each().values()))
    model = load_skeleton(config.base, first.data.base_task)
    wide = 2 if config.base.dtype == "bfloat16" or (config.base.dtype == "auto" and torch.cuda.is_available()) else 4
    total = sum(each.numel() for each in model.parameters())
    linear = sum(each.numel() for each in floating_weights(model))
    bits = BITS.get(config.base.quantize or "", 8 * wide)
    return linear * bits / 8 + (total - linear) * wide


def check_alike(parts: RunParts, group: Group) -> None:
    """Raise `GraftError` where ranks have other versions, another base or other data; then give all of them the first rank's weights."""
    if group.size == 1:
        return
    group.same(
        {
            "the version of graft": __version__,
            "the version of torch": torch.__version__,
            "the version of transformers": transformers.__version__,
            "the version of python": platform.python_version(),
            "the base": str(parts.base.identity),
            "the data": str([part.data.train.digest for part in parts.members]),
            "the configuration": str(parts.config.model_dump(mode="json")),
        }
    )
    for job in parts.jobs:
        if job.name not in parts.shares.homes:
            group.spread([tensor for _, tensor in job.trainable.tensors()])

"""Offload a job: its tensors go to a file of the run folder, and come back bit for bit.

The adapter stays attached, with empty tensors, so nothing is built again and every parameter keeps its identity. No forward pass
names an offloaded job.
"""

from __future__ import annotations

import os

import torch

from graft.runs.folder import RunFolder
from graft.training.checkpoints import ADAPTER, OPTIMISER, offloaded, with_prefix, write_job
from graft.training.job import Job
from graft.training.tensor_files import load_tensors
from graft.training.updates.states import restore_optimizer
from graft.utils.clock import timed
from graft.utils.files import explain_write_errors
from graft.utils.temporary import temporary


@timed("checkpoints")
def offload(folder: RunFolder, job: Job, writes: bool = True) -> None:
    """Write a job's tensors to its file and free their memory, on the ranks on which it lives.

    Where several ranks hold the job, one of them `writes`. The file is new each time, never changed in place: checkpoints may have hard
    links to an older one.
    """
    job.resident = False
    if not job.here:
        return
    if writes:
        path = offloaded(folder, job)
        with explain_write_errors(path):
            path.parent.mkdir(exist_ok=True)
            with temporary(path) as fresh:
                write_job(job, fresh)
                os.replace(fresh, path)
    empty(job)


def empty(job: Job) -> None:
    """Free the memory of a job's tensors. Every parameter keeps its identity."""
    for _, tensor in job.trainable.tensors():
        tensor.data = torch.empty(0, dtype=tensor.dtype, device=tensor.device)
        tensor.grad = None
    job.trainable.note_offloaded(True)
    job.optimizer.state.clear()


@timed("checkpoints")
def reload(folder: RunFolder, job: Job) -> None:
    """Load an offloaded job's tensors back into memory, on the ranks on which it lives."""
    job.resident = True
    if not job.here:
        return
    stored = load_tensors(offloaded(folder, job))
    own = with_prefix(stored, ADAPTER)
    for name, tensor in job.trainable.tensors():
        tensor.data = own[name].to(tensor.device)
    restore_optimizer(job.optimizer, list(job.params), with_prefix(stored, OPTIMISER))
    job.trainable.note_offloaded(False)

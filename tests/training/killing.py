"""What runs in a process of its own: training, and training that is killed, without warning, at a chosen moment."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Any

import torch


def work(yaml: str, out: str, kill: str | None, go_on: bool) -> None:
    """Train, or go on with a run. `kill`: "first" (before the first checkpoint stands) or "writing" (half of a later one is written)."""
    from graft.config import load_run
    from graft.training import checkpoints as state
    from graft.training import resume, train

    torch.set_num_threads(1)
    plain, count = state.save_tensors, [0]

    def killed(tensors: Any, path: Any) -> None:
        plain(tensors, path)
        count[0] += 1
        if (kill == "first" and count[0] == 1) or (kill == "writing" and count[0] == 5):
            os.kill(os.getpid(), signal.SIGKILL)

    state.save_tensors = killed
    if go_on:
        resume(Path(out), quiet=True)
    else:
        train(load_run(yaml), Path(out), quiet=True)


def slow_work(yaml: str, out: str, kill: str | None, go_on: bool) -> None:
    """The same with a pause after every step, so that another process can kill it in between."""
    from graft.training import engine

    plain = engine.joint_step

    def slow(*given: Any) -> Any:
        time.sleep(0.05)
        return plain(*given)

    engine.joint_step = slow
    work(yaml, out, kill, go_on)


def many_work(yaml: str, out: str, late: str, kill_at: int | None, go_on: bool) -> None:
    """A run of many jobs: one more is submitted, and another ranked up, after step 5; SIGKILL before the step `kill_at`."""
    from graft.config import load_job, load_run
    from graft.runs.commands import CommandQueue
    from graft.training import engine, resume, train

    torch.set_num_threads(1)
    plain, taken = engine.joint_step, [0]

    def counted(*given: Any) -> Any:
        taken[0] += 1
        if taken[0] == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)
        found = plain(*given)
        if taken[0] == 5 and not go_on:
            CommandQueue(Path(out)).put("priority", "third", priority=5)
            job = load_job(late, "late", load_run(yaml))
            CommandQueue(Path(out)).put("submit", "late", config=job.model_dump(mode="json"))
        return found

    engine.joint_step = counted
    if go_on:
        resume(Path(out), quiet=True)
    else:
        train(load_run(yaml), Path(out), quiet=True)

"""Processes that run the command line of Graft and end as a campaign wants: killed at a file operation, in a write, after a step.

They are forked from a server that has torch loaded, so that each costs its own work only.
"""

from __future__ import annotations

import multiprocessing
import os
import resource
import signal
import sys
import time
from pathlib import Path
from typing import Any

PRELOADED = ("graft.training", "graft.evaluation", "graft.cli.train", "datasets", "torch.optim.adamw",
             "transformers.models.llama.modeling_llama", "transformers.models.auto.tokenization_auto",
             "tests.reliability.processes")  # fmt: skip
CHANGING = (
    "os.rename",
    "os.remove",
    "os.mkdir",
    "os.rmdir",
    "os.link",
    "os.truncate",
    "shutil.rmtree",
    "shutil.copyfile",
)


class Child:
    """`graft WORDS` in a process of its own. how: options of `work`."""

    def __init__(self, words: list[Any], cwd: Path, **how: Any) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(list(PRELOADED))
        self.log = cwd / "logs" / f"{time.monotonic_ns()}"
        self.log.parent.mkdir(exist_ok=True)
        self.process = context.Process(target=work, args=([str(word) for word in words], str(cwd), str(self.log), how))
        self.process.start()

    def send(self, number: int) -> None:
        """Send a signal."""
        assert self.process.pid is not None
        os.kill(self.process.pid, number)

    def end(self, seconds: float = 300) -> int:
        """Wait for the end; the exit code, or minus the signal's number. One that hangs is killed and fails the test."""
        self.process.join(seconds)
        if self.process.is_alive():
            self.process.kill()
            raise TimeoutError(f"the process hangs: {self.said}")
        code = self.process.exitcode
        assert code is not None and "Traceback (most recent call last)" not in self.said, self.said
        return code

    @property
    def out(self) -> str:
        return Path(f"{self.log}.out").read_text(errors="replace")

    @property
    def said(self) -> str:
        path = Path(f"{self.log}.err")
        return path.read_text(errors="replace") if path.exists() else ""


def graft(words: list[Any], cwd: Path, **how: Any) -> tuple[int, str]:
    """Run `graft WORDS`; exit code and what it said on stderr."""
    child = Child(words, cwd, **how)
    return child.end(), child.said


def work(words: list[str], cwd: str, log: str, how: dict[str, Any]) -> None:
    """The child. how: watch (folder), kill_at (number of the operation), tear (bytes), kill_after (step), pause (seconds), orders (path),
    streams (descriptor for both)."""
    import torch

    torch.set_num_threads(1)
    os.chdir(cwd)
    for name, stream in (("out", 1), ("err", 2)):
        os.dup2(how.get("streams") or os.open(f"{log}.{name}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), stream)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # also where the tests themselves run under nohup
    if "tear" in how:  # the system kills the process in the middle of a write, so that a file is half written
        signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
        resource.setrlimit(resource.RLIMIT_FSIZE, (how["tear"], how["tear"]))
    if "limit" in how:
        resource.setrlimit(resource.RLIMIT_FSIZE, (how["limit"], how["limit"]))
    if "watch" in how:
        sys.addaudithook(_watcher(how["watch"], how.get("kill_at")))
    _change_steps(how)
    from graft.cli import main

    main(words)


def _watcher(folder: str, kill_at: int | None) -> Any:
    """An audit hook that counts the file operations in a folder, and kills this process before one of them."""
    count = 0

    def hook(event: str, given: tuple[Any, ...]) -> None:
        nonlocal count
        if event == "open":
            flags = given[2]
            if not isinstance(flags, int) or not flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
                return
        elif event not in CHANGING:
            return
        path = given[0]
        if not isinstance(path, str | bytes | os.PathLike) or folder not in os.path.abspath(os.fsdecode(path)):
            return
        count += 1
        if count == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)
        if kill_at is None:
            os.write(1, b"operation\n")

    return hook


def _change_steps(how: dict[str, Any]) -> None:
    """Let the run pause before each step, take orders after its fifth, or be killed after one.

    A run that was killed after it had saved its fifth step, and before it was given orders, gets them after the step that it goes on with.
    """
    from graft.training import engine

    plain = engine.Engine._step

    def step(self: Any, jobs: Any) -> None:
        time.sleep(how.get("pause", 0))
        plain(self, jobs)
        if "orders" in how and self.step >= 5:
            _order(Path(how["orders"]))
        if self.step == how.get("kill_after"):
            os.kill(os.getpid(), signal.SIGKILL)

    engine.Engine._step = step


def _order(run: Path) -> None:
    """Submit a job and rank another up, unless that was done before a kill."""
    from graft.config import load_job, load_run
    from graft.runs.commands import CommandQueue

    queue = CommandQueue(run)
    there = {command["do"] for command in (*queue.journal.read(), *queue.pending())}
    if "priority" not in there:
        queue.put("priority", "prompt", priority=5)
    if "submit" not in there:
        job = load_job(
            {"adapter": {"kind": "lora", "rank": 2}, "train": {"steps": 3, "seed": 9}},
            "late",
            load_run(run / "config.yaml"),
        )
        queue.put("submit", "late", config=job.model_dump(mode="json"))

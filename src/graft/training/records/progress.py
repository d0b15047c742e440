"""Show the progress of a run on stderr: a live line in a terminal, plain lines elsewhere."""

from __future__ import annotations

import resource
import sys
import time
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from graft.utils.terminal import console as make_console

PLAIN_SECONDS = 10.0
"""Shortest time between two plain lines."""


def memory_bytes(device: torch.device) -> int:
    """Peak memory so far, in bytes: that of the GPU where the run is on one, else that of the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


class Reporter:
    """Shows steps and prints sentences. total: optimiser steps of all jobs. A `quiet` reporter prints nothing."""

    def __init__(self, total: int, done: int = 0, quiet: bool = False, console: Console | None = None) -> None:
        self.console = console or make_console(stderr=True, quiet=quiet, highlight=False)
        self.total, self.quiet = total, quiet
        self._shown = 0.0
        self.live = self.console.is_terminal and not quiet
        self._bar: Progress | None = None
        self._started, self.first = time.monotonic(), done

    def _start(self) -> Progress:
        columns = (
            BarColumn(),
            TextColumn("{task.completed}/{task.total}"),
            TextColumn("{task.description}", markup=False),
        )
        bar = Progress(*columns, TimeElapsedColumn(), TimeRemainingColumn(), console=self.console)
        self._task = bar.add_task("", total=self.total, completed=self.first)
        bar.start()
        return bar

    def step(self, step: int, metrics: dict[str, Any]) -> None:
        """Show that `step` optimiser steps were taken, over all jobs. Several jobs show their losses by name, and their steps together."""
        unit = "job steps" if "losses" in metrics else "step"
        losses = "  ".join(f"{name} {loss:.4f}" for name, loss in metrics.get("losses", {}).items())
        text = (
            (losses or f"loss {metrics['loss']:.4f}{_pairs(metrics)}  lr {metrics['lr']:.2e}")
            + f"  {metrics['tokens_per_second']:,.0f} tokens/s  "
            + f"{metrics['memory_bytes'] / 2**30:.2f} GiB"
        )
        if self.live:
            self._bar = self._bar or self._start()
            self._bar.update(self._task, completed=step, description=f"{unit}  {text}")
        elif step in (1, self.total) or time.monotonic() - self._shown >= PLAIN_SECONDS:
            self._shown = time.monotonic()
            self.say(f"{unit} {step}/{self.total}  {text}  {self._left(step)}")

    def _left(self, step: int) -> str:
        seconds = (time.monotonic() - self._started) / max(1, step - self.first) * (self.total - step)
        return f"{int(seconds // 3600)}:{int(seconds // 60 % 60):02d}:{int(seconds % 60):02d} left"

    def say(self, text: str) -> None:
        """Print a sentence, above the live line where there is one."""
        self.console.print(text, markup=False, soft_wrap=True)

    def show(self, *tables: Any) -> None:
        """Print rich text and tables, in a terminal only: other readers have metrics.jsonl and samples.jsonl."""
        if self.live:
            self.console.print(*tables)

    def close(self) -> None:
        """Remove the live line."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None


def _pairs(metrics: dict[str, Any]) -> str:
    """The scores of a job that learns from pairs, for the line of a step; empty for other jobs."""
    return f"  {metrics['accuracy']:.0%} right, margin {metrics['margin']:.3f}" if "margin" in metrics else ""

"""A model of how much memory a step takes, fitted to measured peaks.

    peak = b0 + b1 tokens + b2 squares + what the jobs themselves hold,    b0, b1, b2 >= 0

`tokens` are those of the step's fullest micro-batch, `squares` the sum of its rows' squared lengths (attention), and b0 is the base. The
fit is non-negative least squares over the steps seen, as in mLoRA (arXiv 2312.02515).

For example, rows of 4 and 3 tokens have the load (7, 25) flat, since 16 + 9 = 25, and (8, 32) padded, where both count as 4 tokens.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

KEPT = 256
"""Number of the latest observations that are fitted."""
SMALLEST_MARGIN = 0.02
"""Smallest margin over a predicted peak, as a share of it."""
SIGMAS = 3.0
"""Margin in standard deviations of the residuals, where that is more."""


@dataclass(frozen=True)
class Load:
    """The size of a micro-batch, as its memory depends on it."""

    tokens: int
    squares: int
    """Sum of squared lengths."""

    @classmethod
    def of(cls, lengths: Sequence[int], padded: bool) -> Load:
        """The load of rows of these lengths. In a padded batch each counts as the longest."""
        size = [max(lengths)] * len(lengths) if padded else lengths
        return cls(sum(size), sum(length * length for length in size))

    @classmethod
    def together(cls, loads: Sequence[Load], budget: int) -> Load:
        """An upper bound of the fullest micro-batch that jobs with these loads can have in one step, under a token budget."""
        tokens = min(sum(load.tokens for load in loads), max(budget, *(load.tokens for load in loads)))
        longest = max(load.squares / load.tokens for load in loads)
        return cls(tokens, int(min(sum(load.squares for load in loads), tokens * longest)))


@dataclass
class MemoryModel:
    """Observations (tokens, squares, bytes without what the jobs hold) and the fit to them."""

    seen: list[tuple[int, int, int]] = field(default_factory=list)

    def observe(self, load: Load, num_bytes: int) -> None:
        """Add a step's measured peak, less what the jobs in memory hold."""
        self.seen = [*self.seen, (load.tokens, load.squares, num_bytes)][-KEPT:]

    def fit(self) -> tuple[np.ndarray, float]:
        """Return (b0, b1, b2) in bytes, and the standard deviation of the residuals."""
        from scipy.optimize import nnls

        seen = np.array(self.seen, dtype=np.float64)
        columns = np.column_stack([np.ones(len(seen)), seen[:, :2]])
        scale = columns.max(0)
        beta, norm = nnls(columns / scale, seen[:, 2])
        return beta / scale, norm / max(1, len(seen) - 3) ** 0.5

    def predict(self, load: Load, own_bytes: int, margin: bool) -> float | None:
        """Predict the peak bytes of a step; None before any step was seen. own_bytes: what its jobs hold.

        The margin is 2 % of the peak, or three standard deviations of the residuals where that is more.
        """
        if not self.seen:
            return None
        beta, sigma = self.fit()
        peak = float(beta @ (1.0, load.tokens, load.squares)) + own_bytes
        return peak + max(SMALLEST_MARGIN * peak, SIGMAS * sigma) if margin else peak


@dataclass
class Peak:
    """The peak that `measuring` found; None where this system cannot measure it."""

    num_bytes: int | None = None


@contextmanager
def measuring(device: torch.device) -> Iterator[Peak]:
    """Measure the peak memory of a block of code: what is allocated on a GPU, else what the process holds (on Linux alone)."""
    peak = Peak()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        yield peak
        peak.num_bytes = torch.cuda.max_memory_allocated(device)
        return
    forgotten = _forget_peak()
    yield peak
    if forgotten:
        peak.num_bytes = _status("VmHWM")


def _forget_peak() -> bool:
    """Reset the kernel's high-water mark of this process to its present size; whether the system allows it."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def _status(name: str) -> int | None:
    """A size of this process, in bytes: VmRSS, what is resident now, or VmHWM, the most since the last reset. None where none is told."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:")), None)


def held_bytes(device: torch.device) -> int:
    """Bytes that are held now: allocated on a GPU, else by the process (0 where the system does not say)."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    return _status("VmRSS") or 0


def room(device: torch.device) -> int | None:
    """Bytes that this process can hold at most at present: what it holds, and what is free; None where the system does not say."""
    if device.type == "cuda":
        return memory_limit(device, None)
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    free = next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")), None)
    return None if free is None else min(free + held_bytes(device), *_limits())


def _limits() -> Iterator[int]:
    """Yield what the system allows this process: its address space, and the memory of its control group."""
    import resource

    soft, _ = resource.getrlimit(resource.RLIMIT_AS)
    yield sys.maxsize if soft == resource.RLIM_INFINITY else soft
    try:
        yield int(Path("/sys/fs/cgroup/memory.max").read_text())
    except (OSError, ValueError):  # no such file, or "max"
        yield sys.maxsize


def memory_limit(device: torch.device, gigabytes: float | None) -> int | None:
    """Bytes that a run may use: as the configuration says, else what a GPU has for this process; None is no limit."""
    if gigabytes is not None:
        return int(gigabytes * 1e9)
    if device.type != "cuda":
        return None
    free, _ = torch.cuda.mem_get_info(device)
    return free + torch.cuda.memory_reserved(device)

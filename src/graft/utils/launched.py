"""What a launcher (torchrun, Slurm with torchrun) says of this process in the environment. Without one, there is one process."""

from __future__ import annotations

import os

RESTARTS = "GRAFT_RESTARTS"
"""Variable with which `--restarts` counts, as torchrun does with its own."""


def size() -> int:
    """How many processes were started for this command."""
    return int(os.environ.get("WORLD_SIZE", 1))


def rank() -> int:
    """The number of this process among them."""
    return int(os.environ.get("RANK", 0)) if size() > 1 else 0


def local_rank() -> int:
    """The number of this process on its machine."""
    return int(os.environ.get("LOCAL_RANK", 0)) if size() > 1 else 0


def local_size() -> int:
    """How many processes were started on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", size()))


def restarts() -> int:
    """How often the launcher has started this command again."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) + int(os.environ.get(RESTARTS, 0))


def inside() -> bool:
    """Whether a launcher started this process."""
    return "TORCHELASTIC_RUN_ID" in os.environ or size() > 1

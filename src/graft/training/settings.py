"""Settings that all jobs of a run share: those of the pass over the base, of checkpoints and of the scheduler."""

from __future__ import annotations

from dataclasses import dataclass, field

from graft.config.activations import Activations
from graft.config.scheduling import SchedulerConfig


@dataclass(frozen=True)
class Settings:
    """Settings that all jobs of a run share; most are fields of `train` in the configuration, which explains them."""

    pad_id: int
    """Token id of padding."""
    token_budget: int = 4096
    layout: str = "auto"
    activations: Activations = "keep"
    compile: str | None = None
    """Backend of torch.compile; None runs eager code."""
    kernels: str = "auto"
    base_dropout: bool = False
    save_every: int | None = None
    keep: int = 3
    log_every: int = 1
    scheduler: SchedulerConfig = field(default_factory=SchedulerConfig)

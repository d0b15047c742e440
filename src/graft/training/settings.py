"""What all jobs of a run share: the pass over the base, checkpoints and the scheduler."""

from __future__ import annotations

from dataclasses import dataclass, field

from graft.config.scheduling import SchedulerConfig


@dataclass(frozen=True)
class Settings:
    """What all jobs of a run share."""

    pad_id: int
    token_budget: int = 4096
    layout: str = "auto"
    gradient_checkpointing: bool = False
    compile: str | None = None  # a backend of torch.compile
    kernels: str = "auto"
    base_dropout: bool = False
    save_every: int | None = None
    keep: int = 3
    log_every: int = 1
    scheduler: SchedulerConfig = field(default_factory=SchedulerConfig)

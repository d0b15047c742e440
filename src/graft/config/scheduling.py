"""The block `scheduler`: which jobs of a run are in memory, which share a step, and which end early."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, field_validator

from graft.config.section import Section


class HalvingConfig(Section):
    """Successive halving: at each rung, the jobs with the worst validation results end."""

    rungs: Annotated[tuple[int, ...], Field(strict=False, min_length=1)]
    """Steps at which each job is validated and compared, in rising order: [100, 200, 400]."""
    keep: float = Field(default=0.5, gt=0, lt=1)
    """Share of the jobs at a rung that continues, rounded up. Only jobs with the same validation data are compared."""

    @field_validator("rungs")
    @classmethod
    def _rungs_rise(cls, value: tuple[int, ...]) -> tuple[int, ...]:
        if any(rung < 1 for rung in value) or list(value) != sorted(set(value)):
            raise ValueError("must be rising numbers of steps, at least 1")
        return value


class MedianConfig(Section):
    """The median rule: at each validation, a job ends whose loss is above the median of all jobs at the same step."""

    after: int = Field(default=1, ge=1)
    """The first step at which a job may end."""
    least: int = Field(default=4, ge=2)
    """The number of losses at a step, this job's among them, before one may end there."""
    history: dict[str, list[float]] = Field(default_factory=dict)
    """Losses of earlier runs at each step, which count as those of other jobs."""


class SchedulerConfig(Section):
    """Which jobs run when. Jobs run by priority, then first come, first served; without a limit all run together."""

    together: int | None = Field(default=None, ge=1)
    """Number of jobs that share a step; null takes all jobs in memory. A smaller number takes the jobs that waste the least padding."""
    resident: int | None = Field(default=None, ge=1)
    """Number of jobs in memory at a time; the others wait on disk. Null takes as many as fit into `memory`."""
    memory: float | None = Field(default=None, gt=0)
    """Memory that the run may use, in GB (1e9 bytes); null means all of the GPU's, or no limit on a CPU."""
    halving: HalvingConfig | None = None
    """Successive halving; null runs every job to its own end."""
    median: MedianConfig | None = None
    """The median rule; null lets no job end by it."""

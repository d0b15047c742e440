"""The section `distributed`: how a run is dealt to the processes that a launcher started."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from graft.config.section import Section

Wanted = Literal["auto", "single", "spread", "ddp", "fsdp2", "pipeline"]


class DistributedConfig(Section):
    """How a run is dealt to several processes."""

    mode: Wanted = "auto"
    """spread: each job lives on one process. ddp: every process holds the base and all adapters, and runs its part of each step. fsdp2: as
    ddp, with the base cut into parts that the processes share. auto: spread where there are as many jobs as processes, else ddp, and
    fsdp2 where the base does not fit. single: one process."""
    timeout: Annotated[float, Field(gt=0)] = 600.0
    """Seconds that a process waits for the others before it takes them for lost."""

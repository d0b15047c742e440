"""The section `distributed`: how a run is dealt to the processes that a launcher started."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from graft.config.section import Section

Wanted = Literal["auto", "single", "spread", "ddp", "fsdp2", "pipeline"]


class DistributedConfig(Section):
    """How a run is dealt to several processes."""

    mode: Wanted = "auto"
    """spread: each job lives on one process. ddp: every process holds the base and all adapters, and runs its part of each step. fsdp2: as
    ddp, with the base cut into parts that the processes share. auto: spread where there are as many jobs as processes, else ddp, and
    fsdp2 where the base does not fit. pipeline: each process holds some of the base's blocks, and all adapters, and hands hidden states on
    to the next. single: one process."""
    stages: Annotated[tuple[Annotated[int, Field(ge=1)], ...] | None, Field(strict=False, min_length=1)] = None
    """For pipeline: the number of blocks of each process, such as [4, 4]; null cuts evenly."""
    timeout: Annotated[float, Field(ge=1, le=1e6)] = 600.0
    """Seconds that a process waits for the others before it takes them for lost, from 1 to 1,000,000."""

    @model_validator(mode="after")
    def _stages_are_of_a_pipeline(self) -> DistributedConfig:
        if self.stages is not None and self.mode != "pipeline":
            raise ValueError(
                f"stages are for mode pipeline, and mode is {self.mode}: set mode to pipeline, or remove stages"
            )
        return self

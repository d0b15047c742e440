"""What does not go with a base that the processes share, in parts (fsdp2) or in stages (pipeline), and with one whose blocks stream."""

from __future__ import annotations

from graft.architectures.blocks import blocks_of
from graft.bases.skeleton import load_skeleton
from graft.config import AnyRun
from graft.distributed.pipeline import even
from graft.errors import GraftError, counted


def refuse_in_parts(config: AnyRun) -> None:
    """Raise `GraftError` for a run whose base cannot be in parts."""
    _refuse_shared(config, "fsdp2")


def refuse_in_stages(config: AnyRun, ranks: int) -> None:
    """Raise `GraftError` for a run whose base cannot be in stages, one for each rank, and for `distributed.stages` that do not fit it.

    Whether the blocks of a base can be parted is only known when they run (`staging.py`).
    """
    _refuse_shared(config, "pipeline")
    for name, own in config.each().items():
        if own.train.answers is not None:
            raise GraftError(f"pipeline does not take train.answers, which '{name}' has: no process can generate alone")
    if config.common().kernels == "liger":
        raise GraftError("pipeline does not take train.kernels: liger: set auto or off")
    if config.scheduler.memory is not None:
        raise GraftError("pipeline does not take scheduler.memory: set scheduler.resident")
    first, base = next(iter(config.each().values())), config.base.model
    blocks = blocks_of(load_skeleton(config.base, first.data.base_task))
    if len({block.stack for block in blocks}) != 1:
        raise GraftError(f"{base} is not one stack of blocks, which is what a pipeline cuts: {advice(config)}")
    count, stages = len(blocks), config.distributed.stages or even(len(blocks), ranks)
    if ranks > count:
        raise GraftError(f"{base} has {counted(count, 'block')}, fewer than the {ranks} processes of the pipeline")
    if len(stages) != ranks or sum(stages) != count:
        given = f"{counted(len(stages), 'stage')} of {counted(sum(stages), 'block')}"
        raise GraftError(
            f"distributed.stages [{', '.join(map(str, stages))}] are {given}, but there are {ranks} processes, and {base} has "
            f"{counted(count, 'block')}"
        )


def advice(config: AnyRun) -> str:
    """Say which modes a run can take whose base cannot be shared."""
    return f"choose distributed.mode {'spread or ' if len(config.each()) > 1 else ''}ddp"


def _refuse_shared(config: AnyRun, mode: str) -> None:
    for name, own in config.each().items():
        if own.train.method.parts is not None:
            raise GraftError(
                f"{mode} shares a frozen base, but train.method {own.train.method.kind} of '{name}' trains the base itself: choose "
                "distributed.mode ddp"
            )
        if own.data.base_task != "causal":
            raise GraftError(
                f"{mode} is for causal models, but data.task of '{name}' is {own.data.task}: {advice(config)}"
            )
    if config.base.offload is not None:
        raise GraftError(
            f"{mode} does not take base.offload, since each process keeps its part on its device: {advice(config)}"
        )
    if config.base.reversible is not None:
        raise GraftError(f"{mode} does not take base.reversible: {advice(config)}")
    if config.common().compile:
        raise GraftError(f"{mode} does not take train.compile: {advice(config)}")


def refuse_streaming(config: AnyRun) -> None:
    """Raise `GraftError` for a run whose base cannot stream from host memory."""
    if config.base.offload is None:
        return
    for name, own in config.each().items():
        if own.train.method.parts is not None:
            raise GraftError(
                f"base.offload keeps frozen blocks in host memory, but train.method {own.train.method.kind} of '{name}' trains the base "
                "itself: remove one of them"
            )
    if config.common().compile:
        raise GraftError("base.offload does not take train.compile, which would keep the blocks: remove one of them")

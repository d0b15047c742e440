"""What does not go with a base in parts (fsdp2)."""

from __future__ import annotations

from graft.config import AnyRun
from graft.errors import GraftError


def refuse_in_parts(config: AnyRun) -> None:
    """Raise `GraftError` for a run whose base cannot be in parts."""
    advice = f"choose distributed.mode {'spread or ' if len(config.each()) > 1 else ''}ddp"
    for name, own in config.each().items():
        if own.train.method.parts is not None:
            raise GraftError(
                f"fsdp2 shares a frozen base, but train.method {own.train.method.kind} of '{name}' trains the base itself: choose "
                "distributed.mode ddp"
            )
        if own.data.base_task != "causal":
            raise GraftError(f"fsdp2 is for causal models, but data.task of '{name}' is {own.data.task}: {advice}")
    if config.base.quantize not in (None, "nf4"):
        raise GraftError(
            f"fsdp2 takes a base in full precision or nf4, not base.quantize: {config.base.quantize}: {advice}"
        )
    if config.base.reversible is not None:
        raise GraftError(f"fsdp2 does not take base.reversible: {advice}")
    if config.common().compile:
        raise GraftError(f"fsdp2 does not take train.compile: {advice}")

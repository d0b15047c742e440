"""What does not go with a base in parts (fsdp2)."""

from __future__ import annotations

from graft.adapters.hooks import EmbeddingAdapter
from graft.config import AnyRun
from graft.errors import GraftError
from graft.training.job import Job

ADVICE = "choose distributed.mode spread or ddp"


def refuse_in_parts(config: AnyRun) -> None:
    """Raise `GraftError` for a run whose base cannot be in parts."""
    for name, own in config.each().items():
        if own.train.method.parts is not None:
            raise GraftError(
                f"fsdp2 shares a frozen base, but '{name}' trains the base itself (train.method): {ADVICE}"
            )
        if own.data.base_task != "causal":
            raise GraftError(f"fsdp2 is for causal models, but data.task of '{name}' is {own.data.task}: {ADVICE}")
    if config.base.quantize not in (None, "nf4"):
        raise GraftError(
            f"fsdp2 takes a base in full precision or nf4, not base.quantize: {config.base.quantize}: {ADVICE}"
        )
    if config.base.reversible is not None:
        raise GraftError(f"fsdp2 does not take base.reversible: {ADVICE}")
    if config.common().compile:
        raise GraftError(f"fsdp2 does not take train.compile: {ADVICE}")


def refuse_prompts(job: Job) -> None:
    """Raise `GraftError` for virtual tokens in the embedding: they run the base once more, on the ranks that have such rows alone."""
    if any(isinstance(module, EmbeddingAdapter) for module in job.modules):
        raise GraftError(
            f"'{job.name}' has virtual tokens in the embedding (prompt, p-tuning), which a base in parts (fsdp2) does not take: {ADVICE}, "
            "or take prefix"
        )

"""A base that trains itself: what of it trains as a table, whether it can be loaded again, and what its number format loses."""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch

from graft.attaching.summary import Summary, SummaryRow, summary
from graft.bases import Base
from graft.bases.inputs import inputs_of
from graft.bases.loading import load_model
from graft.bases.whole import write_model
from graft.config.base import BaseConfig
from graft.data.batches import padded
from graft.errors import GraftError
from graft.injection.state import unwrapped
from graft.training.forward.modes import evaluating
from graft.training.job import Job
from graft.training.trainable import TrainedBase, TrainedInt8Base
from graft.training.updates.rounding import rounds_stochastically


def trained_summary(model: torch.nn.Module, job: Job) -> Summary:
    """Return the table of what a job trains: its adapter's sites, or the named parts of the base."""
    sites = summary(model)
    if not isinstance(job.trainable, TrainedBase):
        return Summary(
            tuple(row for row in sites.rows if row.adapter == job.name),
            (job.name,),
            {job.name: sites.adapter_parameters[job.name]},
            sites.base_parameters,
        )
    rows = []
    for part, found in job.trainable.by_part.items():
        modules = list(dict.fromkeys(name.rpartition(".")[0] for name in found))
        count = job.trainable.part_counts[part]
        rows.append(SummaryRow(job.name, job.config.method.kind, part, len(modules), modules[0], count))
    return Summary(tuple(rows), (job.name,), {job.name: job.trainable.count}, job.trainable.base_count)


def reload_difference(base: Base, job: Job, pad_id: int) -> float:
    """Write the base, load it again and compare both on a sample: the largest difference of logits."""
    first = padded([job.train[0]], [0], pad_id).to(base.device)
    inputs = inputs_of(unwrapped(base.model), first)
    labels = base.model.config.id2label if base.task == "classification" else {}
    dtype = str(base.dtype).removeprefix("torch.")
    with tempfile.TemporaryDirectory() as scratch, evaluating(base.model):
        write_model(base, Path(scratch), job.trainable.whole())
        saved = BaseConfig(model=scratch, dtype=dtype, device=str(base.device))  # pyright: ignore
        again = load_model(saved, base.task, [labels[number] for number in sorted(labels)])
        return float((base.model(**inputs).logits - again(**inputs).logits).abs().max())


def rounding_note(base: Base, job: Job) -> str | None:
    """A sentence on what training in bfloat16 loses, where the base's own weights train in it; else None."""
    if not isinstance(job.trainable, TrainedBase) or isinstance(job.trainable, TrainedInt8Base):
        return None
    if base.dtype != torch.bfloat16 or rounds_stochastically(job):
        return None
    kept = "; {kind: full, rounding: stochastic} keeps them on average" if job.config.method.kind == "full" else ""
    return (
        "The weights train in bfloat16, which has 8 significant bits: an update of less than half a step, 1/512 to 1/256 of a weight's "
        f"size, is lost. With lr {job.config.lr:g} this concerns most weights above {job.config.lr * 512:.2g}. base.dtype: float32 keeps "
        f"all updates and takes twice the memory{kept}"
    )


def refuse_no_effect(base: Base, job: Job) -> None:
    """Raise `GraftError` for settings of a base that trains that do not suit its number format or its new tokens."""
    if job.config.accumulate_in is not None and base.dtype == torch.float32:
        raise GraftError("train.accumulate_in: float32 has no effect on a base in float32: remove it")
    if rounds_stochastically(job) and base.dtype == torch.float32:
        raise GraftError(
            "train.method.rounding: stochastic has no effect on a base in float32, which loses no updates: remove it"
        )
    if not base.added or job.trainable.adapter is not None:
        return
    if not base.model.get_input_embeddings().weight.requires_grad:
        raise GraftError(
            "base.new_tokens adds rows to the embedding, which train.method does not train: add embed (and head) to its `parts`"
        )

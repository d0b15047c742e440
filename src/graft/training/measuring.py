"""What `graft check` measures of one job: a step, the reload of what is saved, and how answers end before training. Of several ranks, each
measures the step; where jobs are spread, the rank on which the job will live measures it."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from graft.attaching.active import set_trainable, use
from graft.attaching.attach import detach
from graft.attaching.parameters import parameters
from graft.attaching.saving import save
from graft.attaching.stored import first_line
from graft.bases import pad_id
from graft.bases.inputs import inputs_of
from graft.data.batches import padded
from graft.distributed.shares import Shares
from graft.formats.loading import load
from graft.injection.state import unwrapped
from graft.training.assembly import RunParts
from graft.training.batching import Batcher
from graft.training.ends import written_ends
from graft.training.forward.causal import Forward
from graft.training.forward.layout import laid_out
from graft.training.forward.modes import evaluating
from graft.training.job import Job
from graft.training.trained_base import reload_difference
from graft.training.trial import MemoryParts, Trial, try_step
from graft.training.validation import stop_rate

ASKED = 16
"""Most samples that the stop rate before training is measured on."""


@dataclass(frozen=True)
class Measured:
    """What was measured of a job."""

    trial: Trial
    difference: float
    """Largest difference of logits between the adapter (or the model) and its saved and loaded copy."""
    stop_rate: float | None
    ends: dict[str, int] | None
    question: str | None
    """A doubt that came up, None if there is none."""

    @classmethod
    def told(cls, given: Mapping[str, Any]) -> Measured:
        """What another rank measured, of `asdict`."""
        trial = {**given["trial"], "memory": MemoryParts(**given["trial"]["memory"])}
        return cls(**{**given, "trial": Trial(**trial)})


def measured(parts: RunParts, forward: Forward, batcher: Batcher, shares: Shares) -> tuple[Measured, dict[int, Trial]]:
    """Measure the one job of these parts; what the first rank (or the job's own) found, and the trial of each rank that ran it.

    shares: who runs what in training. Raises `OutOfMemory` where the step does not fit.
    """
    group, name = shares.group, parts.jobs[0].name
    if name not in shares.homes:
        own = _measure(parts, forward, batcher)
        trials = group.gather(asdict(own.trial))
        found = {rank: Measured.told({**asdict(own), "trial": each}).trial for rank, each in enumerate(trials)}
        return own, found
    home, own = shares.homes[name], None
    with group.agreed():
        if shares.here(name):
            own = _measure(parts, forward, batcher)
    told = Measured.told(group.tell(None if own is None else asdict(own), home) or {})
    return told, {home: told.trial}


def _measure(parts: RunParts, forward: Forward, batcher: Batcher) -> Measured:
    model, (job,) = parts.base.model, parts.jobs
    if job.trainable.adapter is not None:
        set_trainable(model, [job.name])
    trial = try_step(parts, forward, batcher)
    ending, written, question, asked = None, None, None, job.validation or job.train
    if job.stop_ids and not asked.has_pairs:
        samples = [asked[at] for at in range(min(len(asked), ASKED))]
        with laid_out(model, batcher.layout):
            ending = stop_rate(forward, job, batcher, samples)
        # Generation goes by the clock, and ranks that share a base have to run as many passes.
        if ending is not None and batcher.shares.mode != "fsdp2":
            try:
                written = written_ends(parts.base, job, samples, trial.seconds / 3)
            except Exception as error:  # a model may train that Graft's generation cannot run
                question = (
                    f"the model trains, but writes no answers here ({type(error).__name__}: {first_line(error)}): graft eval, predict "
                    "and chat will fail in the same way."
                )
    if job.trainable.adapter is None:
        difference = reload_difference(parts.base, job, pad_id(parts.base.tokenizer, model))
    else:
        difference = _reload(parts, job)
    return Measured(trial, difference, ending, written, question)


def _reload(parts: RunParts, job: Job) -> float:
    """Save the adapter, load it under another name and compare both on a sample: the largest difference of logits.

    Random numbers are added to the weights first, so that a copy that stays fresh shows. The adapter's own weights come back.
    """
    model, other = parts.base.model, f"{job.name}-reloaded"
    kept = {name: parameter.detach().clone() for name, parameter in parameters(model, job.name)}
    first = padded([job.train[0]], [0], pad_id(parts.base.tokenizer, model)).to(parts.base.device)
    inputs = inputs_of(unwrapped(model), first)
    with torch.no_grad(), tempfile.TemporaryDirectory() as folder, torch.random.fork_rng(), evaluating(model):
        for _, parameter in parameters(model, job.name):
            parameter.add_(torch.randn_like(parameter) * 0.01)
        save(model, job.name, Path(folder) / "adapter")
        load(model, Path(folder) / "adapter", name=other)
        with use(model, job.name):
            own = model(**inputs).logits
        with use(model, other):
            loaded = model(**inputs).logits
        detach(model, other)
        for name, parameter in parameters(model, job.name):
            parameter.copy_(kept[name])
    return float((own - loaded).abs().max())

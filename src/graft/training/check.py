"""`graft check`: find what can go wrong with a run before it costs an hour.

Schema, base, tokenizer, template and data are read as training reads them; three samples show what is trained on; every site is named; one
measured step on the longest batch gives memory and time; a saved adapter is loaded again and compared.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch

from graft.attaching.active import set_trainable, use
from graft.attaching.attach import detach
from graft.attaching.parameters import parameters
from graft.attaching.saving import save
from graft.attaching.stored import first_line
from graft.attaching.summary import Summary
from graft.bases import pad_id
from graft.bases.inputs import inputs_of
from graft.bases.memory import MemoryReport, memory_report
from graft.bases.quantised import Quantised, quantised
from graft.bases.tokens import special_among, unlearnt
from graft.config import AnyRun, RunConfig
from graft.data.batches import padded
from graft.data.overlap import OverlapReport, Question, overlap_reports
from graft.data.splits import samples_of
from graft.errors import counted
from graft.formats.loading import load
from graft.injection.state import unwrapped
from graft.training.assembly import RunParts, build
from graft.training.batching import Batcher
from graft.training.ends import written_ends
from graft.training.forward.causal import Forward
from graft.training.forward.layout import Decision, decide, laid_out
from graft.training.forward.modes import evaluating
from graft.training.forward.tasks import forward_of
from graft.training.job import Job
from graft.training.out_of_memory import named
from graft.training.questions import questions
from graft.training.trained_base import reload_difference, trained_summary
from graft.training.trial import Trial, try_step
from graft.training.validation import stop_rate

SAMPLES_SHOWN = 3
ASKED = 16
"""Most samples that the stop rate before training is measured on."""


@dataclass(frozen=True)
class CheckReport:
    """What `graft check` found. `problems` is empty for a run that can start."""

    parts: RunParts
    base: MemoryReport
    sites: Summary
    layout: Decision
    trial: Trial
    reload_difference: float
    """Largest difference of logits between the adapter (or the model) and its saved and loaded copy."""
    overlaps: dict[str, OverlapReport]
    """The questions of each test set that are in the training data, by name of the test set."""
    problems: tuple[str, ...]
    questions: tuple[str, ...]
    """Settings that are allowed but seldom meant, a sentence for each."""
    quantised: Quantised | None = None
    """How the base is quantised, None if it is not."""
    stop_rate: float | None = None
    """Before training: the share of validation samples (or training samples) whose end mark is likelier than not where the answer ends."""
    ends: dict[str, int] | None = None
    """Before training: how many of a few written answers end by themselves (`written_ends`)."""

    def to_dict(self) -> dict[str, Any]:
        """Return the report as JSON values."""
        job = self.parts.jobs[0]
        return {
            "base": {
                "name": self.parts.base.name,
                "parameters": self.base.parameters,
                "bytes": self.base.num_bytes,
                "quantised": None if self.quantised is None else self.quantised.to_dict(),
            },
            "template": {"name": self.parts.data.template.name, "digest": self.parts.data.template.digest},
            "data": self.parts.data.report.to_dict(),
            "sites": [vars(row) for row in self.sites.rows],
            "adapter_parameters": self.sites.adapter_parameters,
            "steps": job.steps,
            "layout": vars(self.layout),
            "trial": asdict(self.trial),
            "reload_difference": self.reload_difference,
            "stop_rate": self.stop_rate,
            "ends": self.ends,
            "overlaps": {name: report.to_dict() for name, report in self.overlaps.items()},
            "problems": list(self.problems),
            "questions": list(self.questions),
        }


def check(config: RunConfig, against: Mapping[str, Sequence[Question]] | None = None) -> CheckReport:
    """Check a run of one job without training it. `against`: test sets by name, whose questions must not be in the training data.

    Raises `GraftError` for whatever would stop the run at its start; what would spoil it later is in `problems`.
    """
    return next(iter(check_each(config, against).values()))


def check_each(config: AnyRun, against: Mapping[str, Sequence[Question]] | None = None) -> dict[str, CheckReport]:
    """Check every job of a run on one base; a report for each, by the job's name. Arguments and errors are those of `check`."""
    parts = build(config)
    model, whole = parts.base.model, memory_report(parts.base.model)
    for each in parts.jobs:
        each.trainable.begin(each.optimizer)
    forward = forward_of(model)
    common = config.common()
    wanted = "padded" if common.compile else common.layout
    batcher = Batcher(common.token_budget, "padded", pad_id(parts.base.tokenizer, model))
    with named():
        decision = decide(forward, parts.jobs, wanted, batcher)
    batcher = replace(batcher, layout=decision.layout)
    return {
        part.job.name: _checked(parts.alone(part), forward, decision, batcher, against, whole) for part in parts.members
    }


def _checked(
    parts: RunParts,
    forward: Forward,
    decision: Decision,
    batcher: Batcher,
    against: Mapping[str, Sequence[Question]] | None,
    whole: MemoryReport,
) -> CheckReport:
    """The report of a run of one job."""
    (part,), model = parts.members, parts.base.model
    job, data = part.job, part.config.data
    overlaps = overlap_reports(chain.from_iterable(samples_of(data)[0]), against) if against else {}
    if job.trainable.adapter is not None:
        set_trainable(model, [job.name])
    trial = try_step(parts, forward, batcher)
    ending, written, asked, asks = None, None, job.validation or job.train, questions(parts)
    if job.stop_ids and not asked.has_pairs:
        samples = [asked[at] for at in range(min(len(asked), ASKED))]
        with laid_out(model, batcher.layout):
            ending = stop_rate(forward, job, batcher, samples)
        if ending is not None:
            try:
                written = written_ends(parts.base, job, samples, trial.seconds / 3)
            except Exception as error:  # a model may train that Graft's generation cannot run
                asks.append(
                    f"the model trains, but writes no answers here ({type(error).__name__}: {first_line(error)}): graft eval, predict "
                    "and chat will fail in the same way."
                )
    if job.trainable.adapter is None:
        difference = reload_difference(parts.base, job, pad_id(parts.base.tokenizer, model))
    else:
        difference = _reload(parts, job)
    what = "model" if job.trainable.adapter is None else "adapter"
    problems = [
        f"the training data hold test questions of {name}: {found}" for name, found in overlaps.items() if found.pairs
    ]
    if difference > 1e-5:
        problems.append(f"a saved and loaded {what} answers differently (logits by {difference:.2g})")
    if not trial.loss < float("inf"):
        problems.append(f"the loss of the longest batch is {trial.loss}")
    problems += _unlearnt(parts, job)
    if parts.data.report.shared:
        shared = parts.data.report.shared
        problems.append(
            f"{counted(shared, 'validation sample')} {'is' if shared == 1 else 'are'} in the training data too"
        )
    return CheckReport(
        parts,
        whole,
        trained_summary(model, job),
        decision,
        trial,
        difference,
        overlaps,
        tuple(problems),
        tuple(asks),
        quantised(model),
        ending,
        written,
    )


def _unlearnt(parts: RunParts, job: Job) -> list[str]:
    """Return a problem for special tokens in the data that the base has not learnt and the adapter does not train."""
    base, train = parts.base, parts.data.train
    if job.trainable.adapter is None:
        return []
    read = special_among(base.tokenizer, np.unique(train.input_ids).tolist())
    found = unlearnt(base.model, job.name, base.tokenizer, read, special_among(base.tokenizer, train.ids_written))
    if not found:
        return []
    rows = [f"{base.tokenizer.convert_ids_to_tokens(token)} {why}" for token, why in found.items()]
    return [
        f"the base has not learnt special tokens of the data: the row of {'; of '.join(rows[:8])}. An adapter that leaves their rows alone "
        "cannot tell them from other tokens, so answers may never end. Train them too, with a list of adapters: "
        f"[..., {{kind: full, sites: embed head, tokens: {sorted(found)}}}]"
    ]


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

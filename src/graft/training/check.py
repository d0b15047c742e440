"""`graft check`: find what can go wrong with a run before it costs an hour.

Schema, base, tokenizer, template and data are read as training reads them; three samples show what is trained on; every site is named; one
measured step on the longest batch gives memory and time; a saved adapter is loaded again and compared.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import chain
from typing import Any

import numpy as np

from graft.attaching.summary import Summary
from graft.bases import pad_id
from graft.bases.memory import MemoryReport, memory_report
from graft.bases.quantised import Quantised, quantised
from graft.bases.tokens import special_among, unlearnt
from graft.config import AnyRun, RunConfig
from graft.data.overlap import OverlapReport, Question, overlap_reports
from graft.data.splits import samples_of
from graft.distributed.group import ALONE, Group
from graft.distributed.shares import Shares
from graft.errors import GraftError, counted
from graft.training.assembly import RunParts, build, weight
from graft.training.batching import Batcher
from graft.training.forward.decision import Decision
from graft.training.forward.layout import decide
from graft.training.forward.tasks import forward_of
from graft.training.job import Job
from graft.training.measuring import Measured, measured
from graft.training.out_of_memory import named
from graft.training.questions import questions
from graft.training.trained_base import trained_summary
from graft.training.trial import Trial
from graft.training.world import check_alike, shares_of

SAMPLES_SHOWN = 3


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
    ranks: Mapping[int, Trial] = field(default_factory=dict)
    """The trial of each rank that measured it."""
    dealt: str | None = None
    """How the run is dealt to several processes, and why."""

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
            **(
                {"dealt": self.dealt, "ranks": {rank: asdict(trial) for rank, trial in self.ranks.items()}}
                if self.dealt
                else {}
            ),
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


def check_each(
    config: AnyRun, against: Mapping[str, Sequence[Question]] | None = None, group: Group = ALONE
) -> dict[str, CheckReport]:
    """Check every job of a run on one base; a report for each, by the job's name. Arguments and errors are those of `check`.

    group: the ranks that will train the run. All get the report; each measures, or the one on which the job will live.
    """
    shares, said = shares_of(config, group) if group.size > 1 else (Shares(), None)
    if shares.mode == "pipeline":
        raise GraftError(
            "graft check measures whole steps, which no process of a pipeline takes: run it in one process"
        )
    # Where jobs are spread, all of them stand on every rank here: a rank that only measures its own still shows their sites.
    whole = shares if shares.mode != "spread" else Shares(group, "ddp")
    with group.agreed():
        parts = build(config, shares=whole)
    check_alike(parts, group)
    shares.settle([(part.job.name, weight(part.config, part.data)) for part in parts.members])
    model, memory = parts.base.model, memory_report(parts.base.model)
    for each in parts.jobs:
        each.trainable.begin(each.optimizer)
    forward = forward_of(model)
    common = config.common()
    wanted = "padded" if common.compile else common.layout
    dealt = Shares() if shares.mode == "spread" else shares
    batcher = Batcher(common.token_budget, "padded", pad_id(parts.base.tokenizer, model), dealt)
    with named():
        decision = decide(forward, parts.jobs, wanted, batcher)
    batcher = replace(batcher, layout=decision.layout)
    found = {}
    for part in parts.members:
        measures = measured(parts.alone(part), forward, batcher, shares)
        found[part.job.name] = _reported(parts.alone(part), decision, against, memory, *measures, said)
    return found


def _reported(
    parts: RunParts,
    decision: Decision,
    against: Mapping[str, Sequence[Question]] | None,
    memory: MemoryReport,
    measures: Measured,
    ranks: Mapping[int, Trial],
    said: str | None,
) -> CheckReport:
    """The report of a run of one job."""
    (part,), model = parts.members, parts.base.model
    job, data = part.job, part.config.data
    overlaps = overlap_reports(chain.from_iterable(samples_of(data)[0]), against) if against else {}
    what = "model" if job.trainable.adapter is None else "adapter"
    problems = [
        f"the training data hold test questions of {name}: {found}" for name, found in overlaps.items() if found.pairs
    ]
    if measures.difference > 1e-5:
        problems.append(f"a saved and loaded {what} answers differently (logits by {measures.difference:.2g})")
    if not measures.trial.loss < float("inf"):
        problems.append(f"the loss of the longest batch is {measures.trial.loss}")
    problems += _unlearnt(parts, job)
    if parts.data.report.shared:
        shared = parts.data.report.shared
        problems.append(
            f"{counted(shared, 'validation sample')} {'is' if shared == 1 else 'are'} in the training data too"
        )
    return CheckReport(
        parts,
        memory,
        trained_summary(model, job),
        decision,
        measures.trial,
        measures.difference,
        overlaps,
        tuple(problems),
        (*questions(parts), *([measures.question] if measures.question else ())),
        quantised(model),
        measures.stop_rate,
        measures.ends,
        ranks,
        said,
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

"""One measured step before training: does the longest batch fit, and how long will the run take?"""

from __future__ import annotations

import copy
import math
import statistics
import time
from collections import Counter
from contextlib import ExitStack, nullcontext, suppress
from dataclasses import dataclass

from graft.bases.memory import memory_report
from graft.distributed.sharded import streamed
from graft.training.assembly import RunParts
from graft.training.batching import Batcher, num_tokens
from graft.training.forward.activations import holding
from graft.training.forward.anchors import prove_anchors
from graft.training.forward.causal import Forward
from graft.training.forward.compiled import compile_forward
from graft.training.forward.kernels import accelerating
from graft.training.forward.layout import laid_out
from graft.training.forward.modes import evaluating, set_training
from graft.training.job import Job
from graft.training.out_of_memory import explained
from graft.training.records.progress import memory_bytes
from graft.training.saved import counting
from graft.training.scheduling.memory import measuring
from graft.training.step import NonFinite, loss_of, sums_by_row
from graft.training.updates.rules import rule_of
from graft.utils.allocator import give_back_free

SHORT = 3.0
"""Seconds. A step that seems to take less is measured as a whole, more than once: on a busy or cold machine two passes say little."""
WARM_STEPS, WARM_SECONDS = 9, 1.0
"""Whole steps are measured until there are so many, or until they took so long together."""


@dataclass(frozen=True)
class MemoryParts:
    """Bytes of what a step holds on the device. The rest of the peak is the process itself (on a CPU) and what lives for a moment."""

    weights: int
    """Of the base, also where it trains. Where blocks stream: those that are on the device at once."""
    adapter: int
    gradients: int
    """Or what stands in for them: the copies of MeZO."""
    optimizer: int
    activations: int
    """What a pass over the batch keeps for backward; 0 where it has none, and where that cannot be told from weights that come and go
    (fsdp2, base.offload) or is in no Python code (torch.compile)."""


@dataclass(frozen=True)
class Trial:
    """One forward pass, and a backward pass where the method has one, over the fullest micro-batch that the job's run will have."""

    tokens: int
    longest: int
    """Tokens of its longest sample."""
    loss: float
    seconds: float
    peak_bytes: int
    """Peak of the memory allocated on a GPU, elsewhere that of the whole process, from its start to the end of such a step."""
    hours: float
    """Time of all steps of the run, without validation and saving."""
    kernels: str
    """The kernels that computed: torch's own, or Liger's."""
    memory: MemoryParts
    compile_seconds: float | None = None
    """Time until the graph of `train.compile` was made and proved; None where the run does not compile."""


def try_step(parts: RunParts, forward: Forward, batcher: Batcher) -> Trial:
    """Run the job's fullest micro-batch as training does. Optimiser, position and parameters stay as they are.

    Ranks that share the rows of a step (`batcher.shares`) all run it, and then whole steps together.

    Raises `OutOfMemory`, with what would fit, where it does not.
    """
    (part,) = parts.members
    job, train = part.job, part.config.train
    rows = batcher.fullest(job)
    before = memory_bytes(forward.device)
    sizes, backward = {job.name: job.objective.size(rows)}, rule_of(job).backward
    batch, context = batcher.inputs(rows, forward.device)
    with ExitStack() as stack:
        stack.enter_context(laid_out(parts.base.model, batcher.layout))
        stack.enter_context(holding(parts.base.model, train.activations, parts.config.base.dropout))
        set_training(parts.base.model, [job.name], parts.config.base.dropout)
        start, compiling = time.perf_counter(), None
        if train.compile:
            forward = copy.copy(forward)  # the other jobs are checked in eager code
            compile_forward(forward, [job], "inductor", batcher)
            compiling = time.perf_counter() - start
        wanted = "off" if train.compile else train.kernels
        kernels = stack.enter_context(accelerating(forward, [job], wanted, batcher)).kernels
        prove_anchors(forward, [job], batcher)
        peak = stack.enter_context(measuring(forward.device))
        seconds, tokens = float("inf"), num_tokens(rows)
        held: Counter[int] = Counter()
        failed: Exception | None = None
        try:
            for count in range(2):  # the faster of two passes counts, since the first also warms up
                if forward.device.type == "cpu":
                    give_back_free()  # what earlier passes left would count, and in a run it is used again
                start = time.perf_counter()
                untold = train.compile or batcher.shares.mode == "fsdp2" or streamed(parts.base.model) is not None
                noted = nullcontext() if count or untold else counting(forward.root, held, Counter())
                with noted, nullcontext() if backward else evaluating(forward.model):
                    loss = loss_of([job], rows, sums_by_row(forward.losses(batch, context), rows, [job]), sizes)
                rule_of(job).discard([job], loss)
                value = float(loss.detach())
                seconds = min(seconds, time.perf_counter() - start)
            group = batcher.shares.group
            step_seconds = group.most(seconds / tokens * job.step_tokens * rule_of(job).passes(job) / group.size)
            # Under torch.compile other shapes would be compiled again.
            if step_seconds < SHORT and not train.compile and math.isfinite(value):
                with suppress(NonFinite):
                    step_seconds = _warm_step(forward, job, batcher)
        except (RuntimeError, MemoryError) as error:
            failed = error
        if failed is not None:
            raise explained(failed, forward, job, batcher, train.activations, rows)
    # The trial takes no optimiser step, and passes without backward make nothing that stands in for gradients.
    lacking = job.own_state if backward else job.own_bytes - job.own_weights
    measured = memory_bytes(forward.device) if peak.num_bytes is None else peak.num_bytes
    return Trial(
        tokens,
        max(row.tokens for row in rows),
        value,
        seconds,
        max(before, measured + lacking),
        step_seconds * job.steps / 3600,
        kernels,
        _parts_of(parts, job, held.total()),
        compiling,
    )


def _parts_of(parts: RunParts, job: Job, activations: int) -> MemoryParts:
    """What the memory of a step consists of."""
    base, gradients = memory_report(parts.base.model).num_bytes, job.own_bytes - job.own_weights - job.own_state
    if (blocks := streamed(parts.base.model)) is not None:
        base += blocks.at_once - (blocks.held if parts.base.device.type != "cpu" else 0)
    if job.trainable.adapter is None:  # in 8 bits they are no parameters any more
        base += job.own_weights - sum(each.numel() * each.element_size() for each in job.params.values())
        return MemoryParts(base, 0, gradients, job.own_state, activations)
    return MemoryParts(base, job.own_weights, gradients, job.own_state, activations)


def _warm_step(forward: Forward, job: Job, batcher: Batcher) -> float:
    """Return the seconds of the job's next step without its update: the median of a few.

    The first one is left out, since kernels, threads and memory warm up in it.
    """
    spent, slowest = list[float](), batcher.shares.group.most
    while len(spent) < 2 or (len(spent) < WARM_STEPS and slowest(sum(spent)) < WARM_SECONDS):
        start = time.perf_counter()
        rule_of(job).rehearse(forward, job, batcher)
        spent.append(time.perf_counter() - start)
    return slowest(statistics.median(spent[1:]))

"""Cut a base into the stages of a pipeline, where that leaves every pass what it was.

Each rank tries its own stage by itself: one row of each job runs through the whole model, and then again through the stage alone, with what
the blocks before it gave in the first pass. Blocks that hand on more than one tensor, share keys with a later block or run in another order
show here. Adapters are attached by then, since some start from the weights around them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from graft.architectures.blocks import Block, blocks_of
from graft.attaching.fingerprint import keep_digest
from graft.bases import pad_id
from graft.bases.loading import check_device
from graft.distributed.pipeline import Links, Stage, even
from graft.errors import GraftError
from graft.injection.call import Call
from graft.injection.holes import empty_table, free, make_hole
from graft.injection.state import state_of, unwrapped
from graft.training.assembly import RunParts
from graft.training.batching import Batcher
from graft.training.forward.layout import decide, laid_out
from graft.training.forward.modes import evaluating
from graft.training.forward.staged import StagedForward
from graft.training.forward.tasks import STAGED, forward_of
from graft.training.job import Job


def divide(parts: RunParts) -> RunParts:
    """Give this rank its stage of the base, where the run is a pipeline; the parts, with the base on its device.

    Raises `GraftError` for a base whose blocks cannot be cut.
    """
    if parts.shares.mode != "pipeline":
        return parts
    config, common, base = parts.config, parts.config.common(), parts.base
    batcher = Batcher(common.token_budget, "padded", pad_id(base.tokenizer, base.model), parts.shares)
    cut_into_stages(base.model, parts.jobs, batcher, common.layout, config.distributed.stages)
    device = check_device(config.base.device)
    if device != base.device:
        for tensor in (*base.model.parameters(), *base.model.buffers()):
            if not tensor.is_meta:  # `Module.to` refuses shapes without values
                tensor.data = tensor.data.to(device)
    return replace(parts, base=replace(base, device=device))


def cut_into_stages(
    model: nn.Module, jobs: Sequence[Job], batcher: Batcher, wanted: str, stages: Sequence[int] | None = None
) -> None:
    """Leave this rank its stage of a model with the adapters of these jobs, in place. All ranks call this.

    wanted: the layout, as `train.layout` says; it is proved here, on the whole model. stages: the number of blocks of each rank.
    """
    group, root = batcher.shares.group, unwrapped(model)
    with group.agreed():
        keep_digest(root)
        stage = _tried(model, jobs, batcher, wanted, stages)
    stage.neighbours = Links(group)


def _tried(model: nn.Module, jobs: Sequence[Job], batcher: Batcher, wanted: str, stages: Sequence[int] | None) -> Stage:
    root, group, blocks = unwrapped(model), batcher.shares.group, blocks_of(unwrapped(model))
    counts = list(stages or even(len(blocks), group.size))
    start = sum(counts[: group.rank])
    own = range(start, start + counts[group.rank])
    forward = forward_of(model)
    forward.proved = decide(forward, jobs, wanted, batcher)
    batcher = replace(batcher, layout=forward.proved.layout)
    rows = [min((row for row in job.rows() if row.view == "adapter"), key=lambda row: row.tokens) for job in jobs]
    micros = [batcher.inputs(micro, forward.device, seeded=False) for micro in batcher.cut(rows)]

    def losses(forward: Any) -> list[Tensor]:
        state_of(model).prompt_caches.clear()
        return [forward.losses(*micro) for micro in micros]

    with laid_out(model, batcher.layout), evaluating(model):
        losses(forward)  # an adapter at the head may need a second pass once, to find out how it can run
        record = _recorded(root, blocks, own, lambda: losses(forward))
        stage = Stage(record, group.rank == 0, group.rank == group.size - 1)
        for number, block in enumerate(blocks):
            if number not in own:
                role = "take" if number == own[0] - 1 else "hand_on" if number == own[-1] + 1 else "pass"
                make_hole(block.module, role, stage, record.more[number])
        _free_tables(root, stage)
        staged = root.__dict__[STAGED] = StagedForward(model, stage, forward)
        try:
            found = losses(staged)
        except (GraftError, torch.OutOfMemoryError):
            raise
        except Exception as error:  # the model's own code, without what other blocks have left for it
            raise _refusal(root, f"stage {group.rank} fails by itself ({type(error).__name__}: {error})") from error
    pairs = list(zip(found, record.losses, strict=True)) if stage.last else record.pairs
    if any(_apart(*pair) for pair in pairs):
        raise _refusal(root, f"stage {group.rank} by itself does not give what it gives in the whole model")
    return stage


def _free_tables(root: Any, stage: Stage) -> None:
    """Free the embedding behind the first stage, and the head before the last one, unless it is the embedding's."""
    table, head = root.get_input_embeddings(), root.get_output_embeddings()
    tied = head.weight is table.weight
    if not stage.first:
        empty_table(table, table.weight.shape[-1])
    if not stage.last and not (stage.first and tied):
        free(head)


@dataclass
class _Record:
    """What one stage was given and gave in passes of the whole model; `Neighbours` for a trial of the stage alone."""

    more: dict[int, int | None] = field(default_factory=dict)
    """For each block, how many things it returns besides the hidden states; None where it returns these alone."""
    given: list[Tensor] = field(default_factory=list)
    wanted: list[Tensor] = field(default_factory=list)
    losses: list[Tensor] = field(default_factory=list)
    pairs: list[tuple[Tensor, Tensor]] = field(default_factory=list)

    def hand_on(self, hidden: Tensor) -> None:
        self.pairs.append((hidden, self.wanted[len(self.pairs)]))

    def take(self, like: Tensor) -> Tensor:
        taken = self.given.pop(0)
        return taken.clone() if taken.shape == like.shape and taken.dtype == like.dtype else like

    def hand_back(self, gradient: Tensor) -> None:
        raise AssertionError("a trial does not go backward")

    def take_back(self, like: Tensor) -> Tensor:
        raise AssertionError("a trial does not go backward")


def _recorded(root: nn.Module, blocks: Sequence[Block], own: range, run: Callable[[], list[Tensor]]) -> _Record:
    """Run passes of the whole model; what the blocks in `own` were given and gave. Raises `GraftError` where blocks do not simply follow
    one another."""
    record, last, handed = _Record(), len(blocks) - 1, dict[str, Any]()

    def before(number: int) -> Any:
        def hook(module: nn.Module, args: Any, kwargs: Any) -> None:
            hidden = Call.of(args, kwargs).x
            follows = handed.get("number", last) == (number - 1) % len(blocks)
            if not follows or (number and handed["hidden"] is not hidden):
                raise _refusal(root, f"block {number} does not simply go on with the output of block {number - 1}")
            if number == own[0]:
                record.given.append(hidden)

        return hook

    def after(number: int) -> Any:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            hidden = output[0] if isinstance(output, tuple) else output
            if not isinstance(hidden, Tensor) or hidden.dim() != 3:
                raise _refusal(root, f"block {number} returns no hidden states [rows, tokens, features]")
            record.more[number] = len(output) - 1 if isinstance(output, tuple) else None
            handed.update(number=number, hidden=hidden)
            if number == own[-1]:
                record.wanted.append(hidden)

        return hook

    handles = [
        handle
        for number, block in enumerate(blocks)
        for handle in (
            block.module.register_forward_pre_hook(before(number), with_kwargs=True),
            block.module.register_forward_hook(after(number)),
        )
    ]
    try:
        record.losses = run()
    finally:
        for handle in handles:
            handle.remove()
    return record


def _apart(found: Tensor, wanted: Tensor) -> bool:
    """Whether tensors differ by more than rounding."""
    exact = wanted.dtype in (torch.float32, torch.float64)
    allowed = (1e-5 if exact else 5e-2) * (1.0 + float(wanted.abs().max()))
    return not float((found - wanted).abs().max()) <= allowed


def _refusal(root: nn.Module, why: str) -> GraftError:
    return GraftError(
        f"{type(root).__name__} cannot be cut into the stages of a pipeline: {why}. Choose distributed.mode ddp"
    )

"""Choose the layout of a run: token-flat (padding-free) where the first batch proves it equal to padded, else padded.

A family whose attention does not keep segments apart mixes sequences in silence. So before the first step, the losses of all supervised
tokens of a few samples have to agree between the layouts.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, replace

import torch
from torch import Tensor, nn

from graft.attention import flat_attention
from graft.data.batches import Layout
from graft.distributed.group import Group
from graft.errors import GraftError
from graft.injection.stacks import without_stacks
from graft.injection.state import state_of
from graft.training.batching import Batcher
from graft.training.forward.causal import Forward
from graft.training.forward.decision import Decision
from graft.training.forward.modes import evaluating
from graft.training.job import Job
from graft.training.rows import Row
from graft.training.step import refuse_missing

PROOF_ROWS = 4
"""Most short rows that a proof runs."""
NOT_FINITE = "losses of the first batch are not finite, so the layouts cannot be compared"
"""The reason where an adapter has diverged, or the base overflows. The step itself will name the job and its samples."""


def decide(forward: Forward, jobs: Sequence[Job], wanted: str, batcher: Batcher) -> Decision:
    """Choose how logits are made, and the layout, by proofs on samples of the first step.

    wanted: `auto`, `flat` or `padded`. batcher: its layout is not read, since that is what is decided here.
    Raises `GraftError` where `flat` is demanded and does not hold.
    """
    if forward.proved is not None:
        return Decision("padded") if wanted == "padded" else forward.proved
    rows = proof_rows(jobs)
    padded = replace(batcher, layout="padded")
    with evaluating(forward.model):
        forward.prove_head(*padded.inputs(rows[:1], forward.device, seeded=False))
        _prove_padding(forward, rows, padded)
        if wanted == "padded" or (wanted == "auto" and not forward.runs_flat):
            return Decision("padded")
        if not forward.runs_flat:
            raise GraftError(
                "train.layout is flat, but samples with labels and answers of a decoder run padded: set train.layout to auto or padded"
            )
        decision = compare_layouts(forward, rows, longest_row(jobs), padded)
    if wanted == "flat" and decision.layout != "flat" and decision.reason != NOT_FINITE:
        raise GraftError(
            f"train.layout is flat, but this model cannot run flat: {decision.reason}. Set train.layout to auto or padded"
        )
    return decision


def agreed_layout(group: Group, own: Decision | None) -> Decision | None:
    """What the ranks make of their decisions: the first that is not flat, else the first; None if no rank has one."""
    found = [Decision(**each) for each in group.gather(None if own is None else asdict(own)) if each is not None]
    return next((each for each in found if each.layout != "flat"), found[0] if found else None)


@contextmanager
def laid_out(model: nn.Module, layout: Layout) -> Iterator[None]:
    """Prepare the model for batches of this layout in a block of code."""
    with ExitStack() as stack:
        if layout == "flat":
            stack.enter_context(flat_attention(model))
        yield


def proof_rows(jobs: Sequence[Job]) -> list[Row]:
    """The shortest rows of the jobs' next steps, the rows of a job side by side: at least two, since one alone cannot mix with another."""
    own = (row for job in jobs for row in job.rows() if row.view == "adapter")
    rows = sorted(own, key=lambda row: row.tokens)[:PROOF_ROWS]
    rows = rows if len(rows) > 1 else [*rows, *rows]
    names = [job.name for job in jobs]
    return sorted(rows, key=lambda row: names.index(row.job))


def _prove_padding(forward: Forward, rows: Sequence[Row], batcher: Batcher) -> None:
    """Raise `GraftError` if rows have other losses in a padded batch than alone, as on models that do not take padding on the right.

    Only batches that the budget allows are tried: a budget of 1 takes one row at a time.
    """
    for group in batcher.cut(rows):
        if len(group) < 2:
            continue
        together = token_losses(forward, group, batcher)
        alone = torch.cat([token_losses(forward, [row], batcher) for row in group])
        difference, allowed = float((together - alone).abs().mean()), _tolerance(forward) * (1.0 + float(alone.mean()))
        if difference > allowed:
            raise GraftError(
                f"{type(forward.root).__name__} gives rows other losses in a padded batch than alone (by {difference:.2g} on average, "
                f"allowed {allowed:.2g}): set train.token_budget to 1, which takes one row at a time"
            )


def _tolerance(forward: Forward) -> float:
    """How much token losses may differ, relative to 1 + their mean: rounding alone moves them in half precision."""
    return 1e-4 if forward.root.dtype in (torch.float32, torch.float64) else 3e-2


def longest_row(jobs: Sequence[Job]) -> Row:
    """The longest row of all that these jobs train on. Windows and chunks of attention show in long rows only."""
    tops = {job.name: int(job.train.lengths.argmax()) for job in jobs}
    rows = [row for job in jobs for row in job.rows_of(job.train[tops[job.name]], tops[job.name], 0)]
    return max((row for row in rows if row.view == "adapter"), key=lambda row: row.tokens)


def compare_layouts(forward: Forward, rows: Sequence[Row], longest: Row, batcher: Batcher) -> Decision:
    """Flat where its token losses are those of the padded layout, else padded with the reason. `batcher`: the padded one.

    The short rows are one batch of each layout. The longest one comes after a short one in a flat batch, and is alone in a padded one.
    """
    flat_batcher, short = replace(batcher, layout="flat"), rows[0]
    padded = [token_losses(forward, each, batcher) for each in (rows, [short], [longest])]
    if not all(bool(each.isfinite().all()) for each in padded):
        return Decision("padded", None, NOT_FINITE)
    try:
        with laid_out(forward.model, "flat"):
            flat = [token_losses(forward, each, flat_batcher) for each in (rows, [short, longest])]
    except torch.OutOfMemoryError:
        raise
    except GraftError as error:
        return Decision("padded", None, str(error))
    except (ValueError, RuntimeError, TypeError, IndexError) as error:  # whatever the model's own code makes of it
        return Decision("padded", None, f"its forward fails on a token-flat batch ({type(error).__name__}: {error})")
    pairs = [(flat[0], padded[0]), (flat[1][: short.targets], padded[1]), (flat[1][short.targets :], padded[2])]
    found = [(float((one - other).abs().mean()), float(other.mean())) for one, other in pairs]
    difference, size = max(found)
    allowed = _tolerance(forward) * (1.0 + size)
    if all(each <= _tolerance(forward) * (1.0 + own) for each, own in found):
        return Decision("flat", difference)
    return Decision(
        "padded",
        difference,
        f"the token losses of the first batch differ by {difference:.2g} on average (allowed {allowed:.2g})",
    )


def token_losses(forward: Forward, rows: Sequence[Row], batcher: Batcher) -> Tensor:
    """The loss of each supervised token of some rows in one pass: [N] in float64, without dropout seeds."""
    return forward.losses(*batcher.inputs(rows, forward.device, seeded=False)).double()


def losses_and_gradients(
    forward: Forward, jobs: Sequence[Job], rows: Sequence[Row], batcher: Batcher
) -> tuple[Tensor, Tensor]:
    """The loss of each supervised token, and the gradient of their sum for the adapters of these rows in one vector."""
    by_name = {job.name: job for job in jobs}
    trained = [each for name in dict.fromkeys(row.job for row in rows) for each in by_name[name].params.values()]
    with without_stacks(state_of(forward.root)):
        losses = token_losses(forward, rows, batcher)
        if not losses.requires_grad:
            refuse_missing(jobs[0], list(jobs[0].params))
        gradients = torch.autograd.grad(losses.sum(), trained, allow_unused=True)
    pairs = zip(gradients, trained, strict=True)
    flat = [(torch.zeros_like(each) if grad is None else grad).double().flatten() for grad, each in pairs]
    return losses.detach(), torch.cat(flat)

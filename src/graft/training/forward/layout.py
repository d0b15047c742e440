"""Which layout a run uses: token-flat where the first batch proves it equal to padded, else padded.

A family whose attention does not keep segments apart mixes sequences in silence, so nothing is taken on trust: the losses of every
supervised token of a few samples, flat and padded, have to agree before the first step.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from graft.attention import flat_attention
from graft.data.batches import Layout
from graft.errors import GraftError
from graft.training.batching import context_of, lay_out
from graft.training.forward.causal import Forward
from graft.training.forward.modes import evaluating
from graft.training.job import Job
from graft.training.rows import Row

PROOF_ROWS = 4


@dataclass(frozen=True)
class Decision:
    """The layout and, where it is not the one that was hoped for, why."""

    layout: Layout
    difference: float | None = None
    """Mean absolute difference of the token losses between the layouts."""
    reason: str | None = None


def decide(forward: Forward, jobs: Sequence[Job], wanted: str, pad_id: int) -> Decision:
    """Prove the head and the layout on the first batch. Raises `GraftError` when `flat` is demanded and does not hold."""
    rows = proof_rows(jobs)
    with evaluating(forward.model):
        one = rows[:1]
        forward.prove_head(lay_out(one, "padded", pad_id).to(forward.device), context_of(one, "padded", seeded=False))
        if wanted == "padded" or (wanted == "auto" and not forward.runs_flat):
            return Decision("padded")
        if not forward.runs_flat:
            raise GraftError(
                "train.layout is flat, but samples with labels and answers of a decoder run padded. Use layout: auto or padded"
            )
        decision = _compare(forward, rows, pad_id)
    if wanted == "flat" and decision.layout != "flat":
        raise GraftError(
            f"train.layout is flat, but this model cannot run so: {decision.reason}. Use layout: auto or padded"
        )
    return decision


@contextmanager
def laid_out(model: nn.Module, layout: Layout) -> Iterator[None]:
    """What the model needs for its batches to have this layout."""
    with ExitStack() as stack:
        if layout == "flat":
            stack.enter_context(flat_attention(model))
        yield


def proof_rows(jobs: Sequence[Job]) -> list[Row]:
    """The shortest samples of the jobs' first steps: at least two, for one sequence alone cannot mix with another."""
    own = (row for job in jobs for row in job.rows() if row.view == "adapter")
    rows = sorted(own, key=lambda row: row.tokens)[:PROOF_ROWS]
    rows = rows if len(rows) > 1 else [*rows, *rows]
    names = [job.name for job in jobs]
    return sorted(rows, key=lambda row: names.index(row.job))


def _compare(forward: Forward, rows: Sequence[Row], pad_id: int) -> Decision:
    padded = token_losses(forward, rows, "padded", pad_id)
    try:
        with laid_out(forward.model, "flat"):
            flat = token_losses(forward, rows, "flat", pad_id)
    except torch.OutOfMemoryError:
        raise
    except GraftError as error:
        return Decision("padded", None, str(error))
    except (
        ValueError,
        RuntimeError,
        TypeError,
        IndexError,
    ) as error:  # whatever a foreign forward makes of a flat batch
        return Decision("padded", None, f"its forward fails on a token-flat batch ({type(error).__name__}: {error})")
    difference = float((flat - padded).abs().mean())
    exact = forward.root.dtype in (torch.float32, torch.float64)
    allowed = (1e-4 if exact else 3e-2) * (1.0 + float(padded.mean()))
    if difference <= allowed:
        return Decision("flat", difference)
    return Decision(
        "padded",
        difference,
        f"the token losses of the first batch differ by {difference:.2g} on average (allowed {allowed:.2g})",
    )


def token_losses(forward: Forward, rows: Sequence[Row], layout: Layout, pad_id: int) -> Tensor:
    """The loss of each supervised token of some rows in one pass, in float64 and without seeds."""
    batch = lay_out(rows, layout, pad_id).to(forward.device)
    return forward.losses(batch, context_of(rows, layout, seeded=False)).double()


def losses_and_gradients(
    forward: Forward, jobs: Sequence[Job], rows: Sequence[Row], layout: Layout, pad_id: int
) -> tuple[Tensor, Tensor]:
    """The loss of each supervised token, and the gradient of their sum for the adapters of these rows in one vector."""
    by_name = {job.name: job for job in jobs}
    trained = [each for name in dict.fromkeys(row.job for row in rows) for each in by_name[name].params.values()]
    losses = token_losses(forward, rows, layout, pad_id)
    gradients = torch.autograd.grad(losses.sum(), trained, allow_unused=True)
    pairs = zip(gradients, trained, strict=True)
    flat = [(torch.zeros_like(each) if grad is None else grad).double().flatten() for grad, each in pairs]
    return losses.detach(), torch.cat(flat)

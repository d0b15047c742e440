"""Which kernels a run uses (`train.kernels`): Liger's where they give the losses and the gradients of torch's own operations, else torch's.

Nothing is taken on trust, as with layouts (`layout.py`): a few samples of the first batch go forward and backward both ways, and every
token's loss and the adapters' gradient have to agree before the first step.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from graft.errors import GraftError
from graft.kernels import Kernels, chosen, serving
from graft.training.batching import Batcher
from graft.training.forward.causal import Forward
from graft.training.forward.layout import losses_and_gradients, proof_rows
from graft.training.forward.modes import evaluating
from graft.training.job import Job

TORCH = "torch"
"""What a run without kernels says it uses."""


@dataclass(frozen=True)
class Acceleration:
    """What computes, and how it was proved."""

    kernels: str = TORCH
    """`torch`, or whose kernels in which version compute how many modules."""
    losses: float | None = None
    """Mean absolute difference of the token losses."""
    gradients: float | None = None
    """Norm of the difference of the adapters' gradients over their norm."""
    reason: str | None = None
    """Why torch's own operations compute although the kernels are there."""


@contextmanager
def accelerating(forward: Forward, jobs: Sequence[Job], wanted: str, batcher: Batcher) -> Iterator[Acceleration]:
    """Let kernels compute in a block of code, if they are wanted, there and proved. The model is ready for batches of the layout.

    Raises `GraftError` where `liger` is demanded and is not there, or does not compute what torch does.
    """
    kernels = chosen(wanted, forward.device)
    with ExitStack() as stack:
        found = Acceleration()
        if kernels is not None:
            found = _prove(stack, forward, jobs, kernels, batcher)
        if wanted == "liger" and found.reason is not None:
            raise GraftError(
                f"train.kernels is liger, whose kernels do not serve: {found.reason}. Use kernels: auto or off"
            )
        yield found


def _prove(stack: ExitStack, forward: Forward, jobs: Sequence[Job], kernels: Kernels, batcher: Batcher) -> Acceleration:
    """Serve the model on the stack, or say why not."""
    own = _losses_and_gradients(forward, jobs, batcher)
    with ExitStack() as trial:
        served = trial.enter_context(serving(forward.model, kernels))
        try:
            theirs = _losses_and_gradients(forward, jobs, batcher)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # Triton's compiler has errors of its own, and of the tools that it calls
            first = (str(error).strip().splitlines() or [""])[0]
            return Acceleration(reason=f"they do not run here ({type(error).__name__}: {first})")
        if not served.used:
            return Acceleration(reason="there is nothing in this model that they compute")
        found = _compare(str(served), own, theirs, forward.root.dtype)
        if found.reason is None:
            stack.push(trial.pop_all())
        return found


def _compare(
    served: str, own: tuple[Tensor, Tensor], theirs: tuple[Tensor, Tensor], dtype: torch.dtype
) -> Acceleration:
    """In bfloat16 rounding alone makes gradients differ from float32's by up to 1.5 % of their norm (small bases of 4 to 32 layers)."""
    losses = float((theirs[0] - own[0]).abs().mean())
    norm, apart = float(own[1].norm()), float((theirs[1] - own[1]).norm())
    exact = dtype in (torch.float32, torch.float64)
    allowed = (1e-4 if exact else 3e-2) * (1.0 + float(own[0].mean()))
    share, allowed_share = apart / norm if norm > 0.0 else apart, 1e-3 if exact else 1e-1
    if losses <= allowed and share <= allowed_share:
        return Acceleration(served, losses, share)
    return Acceleration(
        TORCH, losses, share,
        f"with them the token losses of the first batch differ by {losses:.2g} on average (allowed {allowed:.2g}) and the gradients by "
        f"{share:.2g} of their norm (allowed {allowed_share:g})",
    )  # fmt: skip


def _losses_and_gradients(forward: Forward, jobs: Sequence[Job], batcher: Batcher) -> tuple[Tensor, Tensor]:
    """Of the rows of the proof, in evaluation mode."""
    with evaluating(forward.model), torch.enable_grad():
        return losses_and_gradients(forward, jobs, proof_rows(jobs), batcher)

"""The kernels of a run (`train.kernels`): Liger's where they give the losses and gradients of torch's own operations, else torch's.

As with layouts (`layout.py`), there is a proof before the first step: a few samples of the first batch go forward and backward both
ways, and the token losses and the adapters' gradients have to agree.
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
"""Name of torch's own operations in events and status."""


@dataclass(frozen=True)
class Acceleration:
    """The kernels in use, and the result of their proof."""

    kernels: str = TORCH
    """`torch`, or the library, its version and the number of modules that its kernels compute."""
    losses: float | None = None
    """Mean absolute difference of the token losses from those of torch."""
    gradients: float | None = None
    """Norm of the difference of the adapters' gradients, divided by their norm."""
    reason: str | None = None
    """Why torch's own operations compute although kernels are available."""


@contextmanager
def accelerating(forward: Forward, jobs: Sequence[Job], wanted: str, batcher: Batcher) -> Iterator[Acceleration]:
    """Use kernels in a block of code where they are wanted, available and proved. The model is ready for batches of the batcher's layout.

    wanted: `auto`, `off` or `liger`.
    Raises `GraftError` where `liger` is demanded and is not available, or does not compute what torch does.
    """
    kernels = chosen(wanted, forward.device) if forward.proved is None else None
    with ExitStack() as stack:
        found = Acceleration()
        if kernels is not None:
            found = _prove(stack, forward, jobs, kernels, batcher)
        if wanted == "liger" and found.reason is not None:
            raise GraftError(
                f"train.kernels is liger, but its kernels cannot be used: {found.reason}. Set train.kernels to auto or off"
            )
        yield found


def _prove(stack: ExitStack, forward: Forward, jobs: Sequence[Job], kernels: Kernels, batcher: Batcher) -> Acceleration:
    """Put kernels into the model until the stack closes, if they pass the proof; else say why not."""
    own = _losses_and_gradients(forward, jobs, batcher)
    with ExitStack() as trial:
        served = trial.enter_context(serving(forward.model, kernels))
        try:
            theirs = _losses_and_gradients(forward, jobs, batcher)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # Triton's compiler raises errors of its own and of tools that it calls
            first = (str(error).strip().splitlines() or [""])[0]
            return Acceleration(reason=f"they do not run here ({type(error).__name__}: {first})")
        if not served.used:
            return Acceleration(reason="this model has no module that they compute")
        found = _compare(str(served), own, theirs, forward.root.dtype)
        if found.reason is None:
            stack.push(trial.pop_all())
        return found


def _compare(
    served: str, own: tuple[Tensor, Tensor], theirs: tuple[Tensor, Tensor], dtype: torch.dtype
) -> Acceleration:
    """Compare the losses and gradients of kernels with those of torch.

    In bfloat16, rounding alone makes gradients differ from those of float32 by up to 1.5 % of their norm (small bases of 4 to 32 layers),
    so 10 % are allowed there.
    """
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
    """The losses and the gradient of the proof's rows, in evaluation mode."""
    with evaluating(forward.model), torch.enable_grad():
        return losses_and_gradients(forward, jobs, proof_rows(jobs), batcher)

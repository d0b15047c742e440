"""The anchors of a reversible base (`base.anchor_every`): enough of them for exact gradients, or an error.

The backward pass computes the streams before a block from those after it, and a rounding error may grow on the way down to the next anchor.
How fast depends on the base and the adapters. So before the first step, the gradients of a few samples are compared with those of the
same pass with an anchor before every block, which need no such way.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch

from graft.architectures.two_streams import TwoStreams, two_streams_of
from graft.errors import GraftError
from graft.training.batching import Batcher
from graft.training.forward.causal import Forward
from graft.training.forward.layout import losses_and_gradients, proof_rows
from graft.training.forward.modes import evaluating
from graft.training.job import Job

ALLOWED = 1e-3
"""How much of their norm the gradients may be off."""


def prove_anchors(forward: Forward, jobs: Sequence[Job], batcher: Batcher) -> float | None:
    """Return by which part of their norm the adapters' gradients differ from exact ones; None on an ordinary base.

    The model is in the modes of training, and ready for batches of the batcher's layout.
    Raises `GraftError` if they differ by more than `ALLOWED`.
    """
    streams = two_streams_of(forward.root)
    if streams is None:
        return None
    with evaluating(forward.model), torch.enable_grad():
        rows = proof_rows(jobs)
        own = losses_and_gradients(forward, jobs, rows, batcher)[1]
        with _anchored(streams, 1):
            exact = losses_and_gradients(forward, jobs, rows, batcher)[1]
    norm = float(exact.norm())
    apart = float((own - exact).norm()) / norm if norm > 0.0 else 0.0
    if not apart <= ALLOWED:
        given = "null" if streams.anchor_every is None else streams.anchor_every
        raise GraftError(
            f"base.anchor_every is {given}: the gradients of the first batch are off by {apart:.2g} of their norm (allowed {ALLOWED:g}), "
            "because rounding errors grow from block to block. Set it to a smaller number; 1 is exact"
        )
    return apart


@contextmanager
def _anchored(streams: TwoStreams, every: int) -> Iterator[None]:
    before, streams.anchor_every = streams.anchor_every, every
    try:
        yield
    finally:
        streams.anchor_every = before

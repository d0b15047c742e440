"""The base as one compiled graph (`train.compile`): torch.compile around the part of the model that a step runs.

A graph does not know the forward context: rows find their adapters by a tensor of slots, so other rows, jobs and routing are other data
in the same graph, and every adapter is computed for all rows. It knows neither segments nor seeds, so batches are padded and the
configuration refuses dropout. What torch cannot compile into one graph is an error, never eager code in silence. On the first samples the
graph has to give the losses and the gradient of eager code.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from graft.architectures.torch_internals import raise_recompile_limit
from graft.errors import GraftError
from graft.training.batching import Batcher
from graft.training.forward.causal import Forward
from graft.training.forward.layout import PROOF_ROWS, losses_and_gradients
from graft.training.job import Job

GRAPHS = 256
"""Graphs that torch may make of one function, where its own limit is 8: each job that joins, ends or is offloaded makes another one."""
OFF = "Set train.compile to false"


def compile_forward(forward: Forward, jobs: Sequence[Job], backend: str, batcher: Batcher) -> float:
    """Compile the part of the model that a step runs; returns the largest difference of a token's loss from eager code on a few samples.

    The model is in the modes of training, and the batcher's layout is padded. Raises `GraftError` where torch cannot compile the model, and
    where the graph's losses or gradients are not those of eager code.
    """
    rows = [row for job in jobs for row in job.rows()[:PROOF_ROWS]]
    wanted, slope = losses_and_gradients(forward, jobs, rows, batcher)
    raise_recompile_limit(GRAPHS)
    if forward.head_mode == "chunks" and forward.adapted.uncut:
        forward.head_mode = "kept"
    if forward.head_mode == "chunks":
        forward.body = torch.compile(forward.body, backend=backend, dynamic=True, fullgraph=True)
    else:
        forward.model = torch.compile(forward.model, backend=backend, dynamic=True, fullgraph=True)  # pyright: ignore
    try:
        found, found_slope = losses_and_gradients(forward, jobs, rows, batcher)
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:  # torch's errors: no compiler, a graph break, an operation that the backend lacks
        first = str(error).strip().splitlines()[0]
        raise GraftError(
            f"train.compile: torch cannot compile this model with its adapters ({type(error).__name__}: {first}). {OFF}"
        ) from error
    difference, apart = float((found - wanted).abs().max()), float((found_slope - slope).norm())
    exact = forward.root.dtype in (torch.float32, torch.float64)
    allowed, allowed_apart = (
        (1e-4 if exact else 1e-1) * (1.0 + float(wanted.max())),
        (1e-3 if exact else 1e-1) * float(slope.norm()),
    )
    if difference <= allowed and apart <= allowed_apart:
        return difference
    raise GraftError(
        f"train.compile: the token losses of the compiled model differ from its own by up to {difference:.2g} (allowed {allowed:.2g}), "
        f"the gradients by {apart:.2g} (allowed {allowed_apart:.2g}). {OFF}"
    )

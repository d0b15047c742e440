"""The base as one compiled graph (`train.compile`): torch.compile around the part of the model that a step runs.

A graph does not know the pass: rows find their adapters by a tensor of slots, so that other rows, jobs and routing are other data in the
same graph, and every adapter is computed for all rows. It knows neither segments nor seeds, so batches are padded and dropout is
refused (`config/compiling.py`). What torch cannot put into one graph is an error, never eager code in silence; and the graph has
to give the losses of eager code on the first samples.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from graft.errors import GraftError
from graft.training.forward import Forward
from graft.training.job import Job
from graft.training.layout import PROOF_ROWS, token_losses

GRAPHS = 256
"""Graphs that torch may make of one function, past its own limit of 8: a job that comes, ends or is set aside makes another one."""
OFF = "Set train.compile to false"


def compile_forward(forward: Forward, jobs: Sequence[Job], backend: str, pad_id: int) -> float:
    """Let a graph make hidden states or logits from now on; the largest difference of a token's loss on a few samples. The model is in the
    modes of training.

    Raises `GraftError` where torch cannot compile the model, and where the graph's losses are not those of eager code.
    """
    rows = [row for job in jobs for row in job.rows()[:PROOF_ROWS]]
    wanted = token_losses(forward, rows, "padded", pad_id).detach()
    torch._dynamo.config.recompile_limit = max(GRAPHS, torch._dynamo.config.recompile_limit)
    if forward.way == "chunks":
        forward.body = torch.compile(forward.body, backend=backend, dynamic=True, fullgraph=True)
    else:
        forward.model = torch.compile(forward.model, backend=backend, dynamic=True, fullgraph=True)  # pyright: ignore
    try:
        found = token_losses(forward, rows, "padded", pad_id).detach()  # behind gradients, which are compiled along
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:  # all of torch's own: no compiler, a graph break, an operation that the backend lacks
        first = str(error).strip().splitlines()[0]
        raise GraftError(
            f"train.compile: torch cannot compile this model with its adapters ({type(error).__name__}: {first}). {OFF}"
        ) from error
    difference = float((found - wanted).abs().max())
    exact = forward.root.dtype in (torch.float32, torch.float64)
    allowed = (1e-4 if exact else 1e-1) * (1.0 + float(wanted.max()))
    if not difference <= allowed:
        raise GraftError(
            f"train.compile: the token losses of the compiled model differ from its own by up to {difference:.2g} (allowed "
            f"{allowed:.2g}). {OFF}"
        )
    return difference

"""Helpers that every batched forward pass here needs: left padding, one adapter per row, eval mode.

Legend: B rows, L padded length.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn

from graft.attaching.active import running
from graft.attaching.parameters import names
from graft.generation.requests import Request
from graft.routing.context import ForwardContext


def routed(model: nn.Module, rows: Sequence[str | None], mask: Tensor | None = None) -> AbstractContextManager[None]:
    """Run a block of code in which row i of the batch uses adapter rows[i] (None: the bare base).

    mask: attention mask [B, L] of the batch. A model without adapters needs no routing.
    """
    if not names(model):
        return nullcontext()
    # One name for the whole batch spares the model from splitting its rows.
    return running(model, ForwardContext(rows[0] if len(set(rows)) == 1 else tuple(rows), mask=mask))


def pad_left(requests: Sequence[Request], device: torch.device) -> tuple[Tensor, Tensor]:
    """Return (token ids [B, L], attention mask [B, L]) of the prompts, padded on the left with zeros.

    Left padding puts the last prompt token of every row in the last column, where the next token is predicted:

        prompts (5, 6, 7) and (8,)  ->  ids [[5, 6, 7], [0, 0, 8]], mask [[1, 1, 1], [0, 0, 1]]
    """
    length = max(len(request.ids) for request in requests)
    ids_BL = torch.tensor([(0,) * (length - len(request.ids)) + request.ids for request in requests])
    counts_B = torch.tensor([len(request.ids) for request in requests])
    mask_BL = (torch.arange(length) >= length - counts_B[:, None]).long()
    return ids_BL.to(device), mask_BL.to(device)

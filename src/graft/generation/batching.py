"""Prompts of unequal length as one batch: padded on the left, each row with its own adapter, the model in evaluation mode.

Legend: B rows, L padded length.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import Tensor, nn

from graft.attaching.active import running
from graft.attaching.parameters import names
from graft.generation.requests import Request
from graft.routing.context import ForwardContext


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode for a block of code; every module's mode comes back."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def routed(model: nn.Module, rows: Sequence[str | None], mask: Tensor | None = None) -> AbstractContextManager[None]:
    """The pass of these rows; nothing to do for a model without adapters."""
    if not names(model):
        return nullcontext()
    return running(model, ForwardContext(rows[0] if len(set(rows)) == 1 else tuple(rows), mask=mask))


def left_padded(requests: Sequence[Request], device: torch.device) -> tuple[Tensor, Tensor]:
    """(ids [B, L], mask [B, L]); what stands at padding is masked by position and never matters."""
    length = max(len(request.ids) for request in requests)
    ids_BL = torch.tensor([(0,) * (length - len(request.ids)) + request.ids for request in requests])
    counts_B = torch.tensor([len(request.ids) for request in requests])
    mask_BL = (torch.arange(length) >= length - counts_B[:, None]).long()
    return ids_BL.to(device), mask_BL.to(device)

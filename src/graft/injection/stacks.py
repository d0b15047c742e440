"""Stacks: adapters of equal shapes that train together, with the factors of all of them one after another in one tensor.

`training/updates/bank.py` makes the tensors. Here a module finds what it computes with them: one update for all adapters in place of one
for each (`ops/low_rank_stack.py`).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from graft.architectures.torch_internals import in_function_transform
from graft.injection.state import State
from graft.ops.low_rank import Update
from graft.ops.low_rank_stack import StackedFactors
from graft.routing.context import ForwardContext
from graft.routing.stacked import Slots, blocks_of


@dataclass(eq=False)
class Stack:
    """The adapters of one stack, as the modules of the base see them."""

    factors: dict[nn.Module, StackedFactors] = field(default_factory=dict)
    """Container -> the factors there. It has those of modules at which every adapter is a low-rank update and no more."""


def stacked_updates(
    container: nn.Module, x: Tensor, context: ForwardContext, slots: Slots
) -> tuple[list[Update], set[str]]:
    """Return the updates of adapters in stacks at a module, and the names of these adapters. Without gradients there are none.

    x: a tensor with all rows.
    """
    updates, done = list[Update](), set[str]()
    alone = isinstance(context.rows, str) or not slots
    if alone or x.dim() != 3 or not torch.is_grad_enabled() or in_function_transform():
        return updates, done
    for stack, block in blocks_of(context, x, slots):
        factors = stack.factors.get(container)
        update = None if factors is None else factors.update(block, x)
        if update is not None:
            updates.append(update)
            done |= block.names
    return updates, done


@contextmanager
def without_stacks(state: State) -> Iterator[None]:
    """Let every adapter compute by itself in a block of code, with gradients that autograd hands on."""
    before, state.slots_in_stacks = state.slots_in_stacks, {}
    try:
        yield
    finally:
        state.slots_in_stacks = before

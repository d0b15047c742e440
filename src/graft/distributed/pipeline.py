"""A pipeline: each rank runs some of the base's blocks, its stage, and hands the hidden states on to the next one.

    rank 0    embedding, blocks 0..3    ->  hidden states
    rank 1                              ->  blocks 4..7, norm, head, losses
              gradient of the states    <-

All ranks run the model's own forward on the same batch, so each makes masks and positions for itself, knows the shapes of what comes, and
messages need no headers. The blocks of other ranks are holes (`injection/holes.py`): the one before a rank's first block takes what was
received, and the one after its last block hands on. Backward takes the same way: the losses of a rank that is not the last stand for those
that it cannot see, and their gradient is the one that the next rank sends.

So the schedule is the order in which a rank calls forward and backward. With `Shares.ahead` passes begun before the first goes backward,
and one backward after each forward from then on, it is 1F1B (Narayanan et al. 2019, arXiv 1806.03377).

Legend: N targets, [..., D] hidden states.
"""

from __future__ import annotations

from collections import deque
from typing import Any, Protocol

import torch
from torch import Tensor
from torch import distributed as dist

from graft.distributed.group import Group


class Neighbours(Protocol):
    """The ranks before and after this one."""

    def hand_on(self, hidden: Tensor) -> None:
        """Give hidden states to the next rank."""
        ...

    def take(self, like: Tensor) -> Tensor:
        """Wait for the hidden states of the rank before, which are of this shape and format."""
        ...

    def hand_back(self, gradient: Tensor) -> None:
        """Give the gradient of what was taken to the rank before."""
        ...

    def take_back(self, like: Tensor) -> Tensor:
        """Wait for the gradient of what was handed on, which is of this shape and format."""
        ...


class Links:
    """Neighbours that are processes. What is sent waits in this process until the other one takes it."""

    def __init__(self, group: Group) -> None:
        self.group = group
        # A channel for each direction: in one channel, messages would have to be sent and taken in one order.
        self.onward, self.backward = group.channel(), group.channel()
        self._sent: deque[tuple[Any, Tensor]] = deque()

    def hand_on(self, hidden: Tensor) -> None:
        self._send(hidden, self.group.rank + 1, self.onward)

    def take(self, like: Tensor) -> Tensor:
        return self._receive(like, self.group.rank - 1, self.onward)

    def hand_back(self, gradient: Tensor) -> None:
        self._send(gradient, self.group.rank - 1, self.backward)

    def take_back(self, like: Tensor) -> Tensor:
        return self._receive(like, self.group.rank + 1, self.backward)

    def _send(self, values: Tensor, to: int, channel: dist.ProcessGroup) -> None:
        values = values.detach().contiguous()
        work: Any = self.group.exchange(lambda: dist.isend(values, to, group=channel))
        self._sent.append((work, values))  # the tensor has to live until it is there
        while len(self._sent) > 4 * self.group.size:  # more than any schedule has under way: the other rank is behind
            self.group.exchange(self._sent.popleft()[0].wait)

    def _receive(self, like: Tensor, source: int, channel: dist.ProcessGroup) -> Tensor:
        values = torch.empty_like(like, memory_format=torch.contiguous_format, requires_grad=False)
        self.group.exchange(lambda: dist.recv(values, source, group=channel))
        return values


class Stage:
    """What one rank runs of the model."""

    def __init__(self, neighbours: Neighbours, first: bool, last: bool) -> None:
        self.neighbours, self.first, self.last = neighbours, first, last
        self._anchor = torch.zeros((), requires_grad=True)
        """What is taken and handed on depends on it, so that every pass that goes backward does so on all ranks."""
        self._handed: Tensor | None = None

    def take(self, hidden: Tensor) -> Tensor:
        """The hidden states of the rank before, in place of those [..., D] that this rank has there."""
        return _Taken.apply(self._anchor, self.neighbours, hidden)  # pyright: ignore[reportReturnType]

    def hand_on(self, hidden: Tensor) -> Tensor:
        """Give hidden states [..., D] to the next rank. What this rank computes after them is for nothing."""
        self.neighbours.hand_on(hidden)
        self._handed = hidden
        return hidden.detach()

    def losses(self, count: int) -> Tensor:
        """Zeros in place of the losses [N] of the pass that has just handed on; backward from them is that of the pass."""
        hidden, self._handed = self._handed, None
        assert hidden is not None
        return _Handed.apply(hidden, self._anchor, self.neighbours, count)  # pyright: ignore[reportReturnType]


class _Taken(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, anchor: Tensor, neighbours: Neighbours, like: Tensor) -> Tensor:
        ctx.neighbours = neighbours
        return neighbours.take(like)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        ctx.neighbours.hand_back(grads[0])
        return None, None, None


class _Handed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, anchor: Tensor, neighbours: Neighbours, count: int) -> Tensor:
        ctx.neighbours, ctx.like = neighbours, hidden.new_empty(()).expand(hidden.shape)
        return hidden.new_zeros(count, dtype=torch.promote_types(hidden.dtype, torch.float32))

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return ctx.neighbours.take_back(ctx.like), None, None, None


def even(blocks: int, ranks: int) -> list[int]:
    """The number of blocks of each rank, as even as can be; the last ranks, which also run the head, have the smaller numbers."""
    return [blocks // ranks + (rank < blocks % ranks) for rank in range(ranks)]

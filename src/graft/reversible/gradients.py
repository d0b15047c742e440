"""The stack of coupled blocks as one autograd function, which keeps its input, both streams after the last block, and anchors.

The backward pass goes from the last block to the first. With y1, y2 and their gradients, a block computes

    g = G(y1)    x2 = (y2 - g) / beta       dy1 <- dy1 + J_G(y1)^T dy2
    f = F(x2)    x1 = (y1 - f) / lambda     dx2 = beta dy2 + J_F(x2)^T dy1       dx1 = lambda dy1

where autograd records f and g alone. A rounding error of the streams grows by 1 / lambda and 1 / beta from block to block, and with the
slopes of F and G. So the streams are in float64, of which F and G read a rounded copy; as long as the error is smaller than what this
rounding removes, f and g are those of the forward pass, but for kernels that round differently from call to call. Both streams are also
kept before every few blocks (anchors), which ends the growth.

Parameters are inputs of the function, so it gives their gradients like any other operation of torch.

Legend: [B, L, D] batch, length, hidden features.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from graft.errors import GraftError
from graft.injection.state import State
from graft.reversible.calls import Autocast, BlockCall, Draws
from graft.reversible.couplings import Coupling, take
from graft.routing.context import ForwardContext


@dataclass(frozen=True, eq=False)
class Step:
    """What is needed to repeat one block: its call, and the random generators before F and before G."""

    call: BlockCall
    first: Draws
    second: Draws


@dataclass(eq=False)
class Record:
    """What a forward pass leaves for its backward pass, apart from tensors that need memory."""

    coupling: Coupling
    state: State | None
    context: ForwardContext | None
    autocast: Autocast
    steps: list[Step] = field(default_factory=list)
    parameters: list[Tensor] = field(default_factory=list)
    """The parameters of the blocks that require gradients. They are not saved tensors, whose hooks would hand back copies."""
    owned: list[list[int]] = field(default_factory=list)
    """Of each block, the numbers of the parameters that it may compute with."""
    not_repeatable: str = ""
    """Why the blocks cannot run again, empty if they can."""


def trainable(record: Record) -> tuple[list[Tensor], list[list[int]]]:
    """Return the parameters that the blocks compute with and that require gradients, each once, and the numbers of each block's own."""
    shared: list[nn.Module] = []
    if record.state is not None and record.context is not None:
        shared = [each for name in record.context.names for each in record.state.adapters[name].shared.values()]
    numbers: dict[Tensor, int] = {}
    owned = []
    for step in record.steps:
        found = [p for module in (step.call.block, *shared) for p in module.parameters() if p.requires_grad]
        owned.append([numbers.setdefault(p, len(numbers)) for p in dict.fromkeys(found)])
    return list(numbers), owned


def mean_of(x1: Tensor, x2: Tensor) -> Tensor:
    """Return what the last block hands on, (x1 + x2) / 2."""
    return (x1 + x2) / 2


class CoupledBlocks(torch.autograd.Function):
    """(x1 + x2) / 2 after the last block, as a function of the embedded tokens and the parameters of the blocks."""

    @staticmethod
    def forward(
        ctx: Any, record: Record, streams: tuple[Tensor, Tensor], anchors: Mapping[int, tuple[Tensor, Tensor]],
        hidden: Tensor, *parameters: Tensor,
    ) -> Tensor:  # fmt: skip
        ctx.record, ctx.places = record, tuple(anchors)
        ctx.save_for_backward(hidden, *streams, *(x for pair in anchors.values() for x in pair))
        return mean_of(*streams).to(hidden.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        record: Record = ctx.record
        if record.not_repeatable:
            raise GraftError(f"a reversible base cannot compute gradients of this pass: {record.not_repeatable}")
        hidden, x1, x2, *rest = ctx.saved_tensors
        anchors = {number: (rest[2 * at], rest[2 * at + 1]) for at, number in enumerate(ctx.places)}
        anchors[0] = (hidden.detach().to(x1.dtype),) * 2
        sums: list[Tensor | None] = [None] * len(record.parameters)
        (dh,) = gradients
        d1 = d2 = dh.to(torch.promote_types(dh.dtype, torch.float32)) / 2
        with ExitStack() as stack:
            if record.state is not None and record.context is not None:
                stack.enter_context(record.state.entered(record.context))
            stack.enter_context(record.autocast.again())
            for number in reversed(range(len(record.steps))):
                block = _Block(record, number, sums)
                (x1, x2), (d1, d2) = block.back((x1, x2), (d1, d2), anchors.get(number))
        d_hidden = (d1 + d2).to(hidden.dtype) if ctx.needs_input_grad[3] else None
        return None, None, None, d_hidden, *sums


class _Block:
    """One block in the backward pass."""

    def __init__(self, record: Record, number: int, sums: list[Tensor | None]) -> None:
        self.coupling, self.step, self.sums = record.coupling, record.steps[number], sums
        self.numbers = record.owned[number]
        self.parameters = [record.parameters[each] for each in self.numbers]

    def back(
        self, after: tuple[Tensor, Tensor], gradients: tuple[Tensor, Tensor], anchor: tuple[Tensor, Tensor] | None
    ) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
        """Return the streams before the block and their gradients, from those after it. anchor: the streams before it, if kept."""
        own, step = self.coupling, self.step
        y1, y2 = own.out(*after)
        dy1, dy2 = own.out(*gradients)
        g, dg = self._through(own.second, y1, dy2, step.second)
        x2 = take(y2, own.beta, g) if anchor is None else anchor[1]
        dy1 = dy1 if dg is None else dy1 + dg
        f, df = self._through(own.first, x2, dy1, step.first)
        x1 = take(y1, own.lam, f) if anchor is None else anchor[0]
        dx2 = own.beta * dy2
        return (x1, x2), (own.lam * dy1, dx2 if df is None else dx2 + df)

    def _through(self, part: Any, x: Tensor, d: Tensor, draws: Draws) -> tuple[Tensor | None, Tensor | None]:
        """Return F(x) or G(x) and J(x)^T d, and add to the gradients of the parameters."""
        x = self.step.call.rounded(x).requires_grad_()
        with torch.enable_grad(), draws.again():
            output = self.step.call.function(part, x)
        if output is None or not output.requires_grad:
            return output, None
        found = torch.autograd.grad(output, (x, *self.parameters), d.to(output.dtype), allow_unused=True)
        for at, gradient in zip(self.numbers, found[1:], strict=True):
            if gradient is not None:
                known = self.sums[at]
                self.sums[at] = gradient if known is None else known + gradient
        return output.detach(), found[0]

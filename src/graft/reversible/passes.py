"""The forward pass of a reversible base: each block adds its own step of the coupling when the model calls it.

The model's own loop over its blocks runs unchanged. What a block returns is (x1 + x2) / 2, with the pass so far as an attribute of the
tensor, from which the next block goes on. So nothing stays on the model, and a model that does anything else between its blocks fails with
an error. Where gradients are recorded, the last block returns the output of one autograd function over the whole stack (`gradients.py`).

Legend: [B, L, D] batch, length, hidden features.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from graft.architectures.two_streams import Place, place_of
from graft.errors import GraftError
from graft.injection.arguments import cache_of, cached_tokens, given_to
from graft.injection.call import Call
from graft.injection.state import State
from graft.injection.substitution import register_outermost
from graft.reversible.calls import Autocast, BlockCall, Draws
from graft.reversible.couplings import COUPLINGS, add
from graft.reversible.gradients import CoupledBlocks, Record, Step, mean_of, trainable
from graft.reversible.halves import CROSS, HALVES

_MARK = "graft_pass"


@register_outermost
class CoupledBlock:
    """Mixin for a block of a reversible base: it computes one step of the coupling in place of its own forward."""

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        return run_block(self, Call.of(args, kwargs))

    def graft_own_forward(self, *args: Any, **kwargs: Any) -> Any:
        """The block's own forward, with the adapters in it."""
        return super().forward(*args, **kwargs)  # pyright: ignore


class StreamPartner(nn.Module):
    """The site `stream` of a block: without adapters it adds nothing to the other stream."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.zeros_like(x)


class _Unreachable(torch.autograd.Function):
    """Hands a tensor on, and refuses to be a part of a backward pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, anything: Tensor) -> Tensor:
        return x

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        raise GraftError(
            "a reversible base gives gradients of its last hidden states only: leave the other hidden states out of the loss"
        )


class ForwardPass:
    """A forward pass that is under way: the two streams, and what a backward pass needs."""

    def __init__(self, block: nn.Module, place: Place, call: Call) -> None:
        self.streams, self.number = place.streams, 0
        self.coupling = COUPLINGS[place.streams.variant]
        self.hidden = call.x
        # Wider than what the blocks compute with: a rounding error of the streams, which grows from block to block, then hardly ever
        # changes what a block reads, so that F and G give the same numbers again.
        wide = torch.float32 if call.x.device.type == "mps" else torch.float64
        self.x1 = self.x2 = call.x.detach().to(wide)
        self.anchors: dict[int, tuple[Tensor, Tensor]] = {}
        self.record: Record | None = None
        given = given_to(block, call.args, call.kwargs)
        if any(given.get(name) is not None for name in CROSS):
            raise GraftError("a reversible base has no cross-attention: leave out encoder_hidden_states")
        self.cache = cache_of(given)
        if torch.is_grad_enabled():
            state: State | None = block.__dict__.get("graft_state")
            context = None if state is None else state.current
            self.record = Record(self.coupling, state, context, Autocast.now(call.x.device.type))
            if self.cache is not None and (cached_tokens(given) or type(self.cache).__name__ != "DynamicCache"):
                self.record.not_repeatable = (
                    "it ran with a KV cache, which the blocks would write to again. Pass use_cache=False"
                )

    def step(self, block: nn.Module, call: BlockCall) -> None:
        """Take one step of the coupling."""
        own, record, every = self.coupling, self.record, self.streams.anchor_every
        if record is not None and every and self.number and self.number % every == 0:
            self.anchors[self.number] = self.x1, self.x2
        device = self.x1.device
        first = None if record is None else Draws(device)
        y1 = add(self.x1, own.lam, self._function(call, own.first, self.x2))
        second = None if record is None else Draws(device)
        y2 = add(self.x2, own.beta, self._function(call, own.second, y1))
        self.x1, self.x2 = own.out(y1, y2)
        if record is not None and first is not None and second is not None:
            kept = call if self.cache is None else call.without(self.cache)
            record.steps.append(Step(kept, first, second))
        self.number += 1

    def _function(self, call: BlockCall, part: Any, x: Tensor) -> Tensor | None:
        """Return F(x) or G(x), computed as in the backward pass: kernels and fused nodes depend on whether gradients are recorded."""
        if self.record is None:
            return call.function(part, call.rounded(x))
        with torch.enable_grad():
            output = call.function(part, call.rounded(x).requires_grad_())
        return None if output is None else output.detach()

    def mean(self) -> Tensor:
        """Return (x1 + x2) / 2 in the dtype of the hidden states. [B, L, D]."""
        return mean_of(self.x1, self.x2).to(self.hidden.dtype)

    def under_way(self) -> Tensor:
        """Return what a block that is not the last one returns."""
        mean = self.mean()
        if self.record is not None:
            mean = _Unreachable.apply(mean, torch.empty(0, requires_grad=True))
        setattr(mean, _MARK, self)
        return mean

    def end(self) -> Tensor:
        """Return what the last block returns."""
        record = self.record
        if record is None:
            return self.mean()
        record.parameters, record.owned = trainable(record)
        if not record.parameters and not self.hidden.requires_grad:
            return self.mean()
        return CoupledBlocks.apply(record, (self.x1, self.x2), self.anchors, self.hidden, *record.parameters)  # pyright: ignore


def run_block(block: Any, call: Call) -> Tensor:
    """Run one block of a reversible base. Raises `GraftError` for a call that the coupling does not allow."""
    place = place_of(block)
    assert place is not None
    _refuse(block, call)
    under_way = ForwardPass(block, place, call) if place.number == 0 else getattr(call.x, _MARK, None)
    if under_way is None or under_way.number != place.number or under_way.streams is not place.streams:
        raise GraftError(
            f"block {place.number} of a reversible base did not get the output of block {place.number - 1}: the model skipped a block "
            "(layerdrop) or changed the hidden states between two blocks"
        )
    halves = HALVES[block.graft_model_type]
    under_way.step(block, BlockCall.of(block, halves, call))
    return under_way.end() if under_way.number == place.streams.count else under_way.under_way()


def _refuse(block: Any, call: Call) -> None:
    if torch.compiler.is_compiling():
        raise GraftError("a reversible base cannot be compiled: leave out torch.compile (train.compile)")
    if getattr(block, "gradient_checkpointing", False) and block.training:
        raise GraftError(
            "gradient checkpointing has no effect on a reversible base, which keeps no activations of its blocks: switch it off"
        )

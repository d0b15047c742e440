"""Several adapters on one row, each with a weight: what they compute together at one module.

An adapter with weight w changes h into h + w (adapt(x, h) - h). Adapters act in the order given, each on what those before it left.
Neighbours that are differences of weights at a linear layer (LoRA and its relatives) are the exception: each adds its difference from what
the base computed, so that together they are the sum of their differences, in any order:

    h' = h + sum_k w_k (adapt_k(x, h) - h)

Legend: [..., I] input features, [..., O] output features, R rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from graft.adapters.base import Adapter
from graft.adapters.hooks import AttentionAdapter, ExpertsAdapter
from graft.injection.hooks import HostedAdapter
from graft.ops.low_rank_update import LowRankUpdate
from graft.routing.context import AdapterContext
from graft.routing.rows import RowSplit


@dataclass(frozen=True, eq=False)
class Part:
    """One module of one of the adapters that act together."""

    hosted: HostedAdapter
    weight: float
    differs: bool
    """Whether it is a difference of weights, which adds to what the base computed."""


class Together(Adapter):
    """The modules of several adapters at one module, in their order. They stay where they are: it refers to them and has no parameters."""

    def __init__(self, parts: Sequence[Part]) -> None:
        nn.Module.__init__(self)
        self._parts = tuple(parts)
        modules = [part.hosted.adapter for part in parts]
        self.reads = "nothing" if all(module.reads == "nothing" for module in modules) else "input"
        self.runs_host = any(module.runs_host for module in modules)

    @property
    def acts_before(self) -> bool:
        return any(part.hosted.acts_before for part in self._parts)

    def before(self, x: Tensor, ctx: AdapterContext) -> Tensor:
        for part in self._parts:
            x = _weighted(x, part.hosted.adapter.before(x, ctx), part.weight)
        return x

    def adapt(self, x: Tensor, h: Tensor, ctx: AdapterContext) -> Tensor:
        start = h
        for part in self._parts:
            if not part.differs:
                h = start = _acting(part, x, h, ctx)
            elif (update := self._update(part, ctx, None)) is not None:
                h = h + part.weight * update.plain(x).to(h.dtype)
            else:
                h = h + (_acting(part, x, start, ctx) - start)
        return h

    def low_rank(self, ctx: AdapterContext, rows: slice | None = None) -> LowRankUpdate | None:
        """The sum of low-rank updates is one of their ranks' sum: B = [w_1 s_1 B_1, w_2 s_2 B_2, ...], A = [A_1; A_2; ...]."""
        updates = [self._update(part, ctx, rows) for part in self._parts]
        if any(update is None or update.p for update in updates):
            return None
        found = [update for update in updates if update is not None]
        A = torch.cat([update.A for update in found])  # [R, I]
        B = torch.cat(
            [update.B * (update.scale * part.weight) for update, part in zip(found, self._parts, strict=True)], 1
        )
        return replace(found[0], A=A, B=B, scale=1.0)

    @staticmethod
    def _update(part: Part, ctx: AdapterContext, rows: slice | None) -> LowRankUpdate | None:
        return part.hosted.adapter.low_rank(ctx, rows) if part.hosted.features is None else None


class WeightedAttention(AttentionAdapter):
    """A second attention, times a weight."""

    def __init__(self, of: AttentionAdapter, weight: float) -> None:
        nn.Module.__init__(self)
        self._of, self.weight = (of,), weight
        self.adapts_output_projection, self.reads = of.adapts_output_projection, of.reads

    @property
    def adds_attention(self) -> bool:
        return True

    def beside(self, query: Tensor, scaling: float, ctx: AdapterContext, x: Tensor | None = None) -> Tensor:
        return self.weight * self._of[0].beside(query, scaling, ctx, x)


class WeightedExperts(ExpertsAdapter):
    """W + w (D(W) - W): what an adapter changes in the weights of experts, times a weight."""

    def __init__(self, of: ExpertsAdapter, weight: float) -> None:
        nn.Module.__init__(self)
        self._of, self.weight, self.part = (of,), weight, of.part

    def changed(self, weight: Tensor) -> Tensor:
        return _weighted(weight, self._of[0].changed(weight), self.weight)


def _acting(part: Part, x: Tensor, h: Tensor, ctx: AdapterContext) -> Tensor:
    hosted = part.hosted
    if hosted.features is None:
        return _weighted(h, hosted.adapter.adapt(x, h, ctx), part.weight)
    own = RowSplit([hosted.features], h.shape[-1], -1)  # q, k or v of a fused projection
    before = own.gather(h, 0)
    return own.scatter(h, [_weighted(before, hosted.adapter.adapt(x, before, ctx), part.weight)])


def _weighted(before: Tensor, after: Tensor, weight: float) -> Tensor:
    return after if weight == 1.0 else before + weight * (after - before)


def local_runs(parts: Sequence[Part]) -> list[list[Part]]:
    """Cut the parts of one module into runs of neighbours that read its own input. A part with an input from elsewhere is alone."""
    runs: list[list[Part]] = []
    for part in parts:
        if runs and not part.hosted.remote and not runs[-1][-1].hosted.remote:
            runs[-1].append(part)
        else:
            runs.append([part])
    return runs

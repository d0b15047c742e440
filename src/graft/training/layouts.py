"""The layouts of a session: a kind runs padding-free where its losses on samples of its own are those of the padded layout.

What holds for an adapter holds for every other of the same configuration. Longer rows are tried anew, since windows and chunks of attention
show in long rows only.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch

from graft.data.batches import Layout
from graft.data.samples import Example
from graft.injection.modes import evaluation_mode
from graft.injection.state import state_of
from graft.training.batching import Batcher
from graft.training.forward.causal import Forward
from graft.training.forward.layout import NOT_FINITE, PROOF_ROWS, Decision, compare_layouts
from graft.training.rows import Row
from graft.training.tenant import Tenant
from graft.training.tokens import Ask, TokenSample


@dataclass
class Layouts:
    """What was proved so far."""

    batcher: Batcher
    """A padded one."""
    _longest: dict[str, int] = field(default_factory=dict)
    """Configuration -> tokens of the longest row for which padding-free held; 0 where it did not."""

    def of(self, forward: Forward, tenant: Tenant, ask: Ask) -> Layout | None:
        """The layout of an ask of a tenant; None where the tenant's losses are not finite, so that nothing can be compared."""
        key = state_of(forward.model).adapter(tenant.name).config.model_dump_json()
        longest = max(len(sample.ids) for sample in ask.samples)
        known = self._longest.get(key)
        if known is None or 0 < known < longest:
            decision = self._compare(forward, tenant.name, ask)
            if decision.reason == NOT_FINITE:
                return None
            self._longest[key] = longest if decision.layout == "flat" else 0
        return "flat" if self._longest[key] else "padded"

    @property
    def usual(self) -> Layout:
        """The layout of an ask of which nothing is known: that of the others, so that it changes nothing for them."""
        return "flat" if any(self._longest.values()) else "padded"

    def _compare(self, forward: Forward, name: str, ask: Ask) -> Decision:
        samples = sorted(ask.samples, key=lambda sample: len(sample.ids))
        few = samples[:PROOF_ROWS]
        rows = [_row(sample, name, at) for at, sample in enumerate(few if len(few) > 1 else [*few, *few])]
        with torch.no_grad(), evaluation_mode(forward.model):
            return compare_layouts(forward, rows, _row(samples[-1], name, 0), self.batcher)


def _row(sample: TokenSample, name: str, number: int) -> Row:
    """A row that learns its own tokens, as the comparison takes them."""
    ids = np.asarray(sample.ids, np.int32)
    ids = ids if len(ids) > 1 else ids.repeat(2)
    example = Example(ids, np.arange(len(ids)) > 0, name, number)
    return Row(name, name, example, number, number, 0, "adapter", 0, 0)

"""A head with adapters, on supervised tokens alone and a chunk at a time.

Tokens of rows whose adapter does not act at the head go through the frozen head as ever (`linear_cross_entropy`). The others are cut into
chunks of logits. The adapters of a chunk act on the tokens of their own rows there. Their gradient depends on what is made of the losses
later, so backward makes the logits of a chunk once more, and never more than one chunk of them exists.

A kind that acts on each token by itself can be cut so. Whether one does is tried on a few tokens, with its draws. Where it does not (it
reads whole rows, or adds a loss), the model's own forward makes the logits of the batch.

Legend: N targets, L tokens of a row, D hidden features, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.utils.checkpoint import checkpoint

from graft.architectures.walk import CONTAINER
from graft.attaching.active import running
from graft.data.batches import Batch
from graft.errors import GraftError
from graft.injection.container import AdapterContainer
from graft.ops import cross_entropy as ops
from graft.ops.cross_entropy import LogitTransform, cross_entropy, linear_cross_entropy
from graft.routing.context import ForwardContext
from graft.routing.picked import PickedForward, Places

PROOF_TOKENS = 6


@dataclass(eq=False)
class AdaptedHead:
    """The head of a model that may have adapters."""

    model: nn.Module
    head: Any
    transform: LogitTransform = LogitTransform()
    _by_token: WeakKeyDictionary[nn.Module, bool] = field(default_factory=WeakKeyDictionary)
    """Module of an adapter at the head -> whether it acts on each token by itself."""

    def names(self, context: ForwardContext) -> frozenset[str]:
        """The adapters of a pass that act at the head."""
        return frozenset(name for name in context.names if self._hosted(name)) if self._hosts else frozenset()

    @property
    def _hosts(self) -> bool:
        return isinstance(self.head._modules.get(CONTAINER), AdapterContainer)

    def whole(self, names: frozenset[str], batch: Batch) -> bool:
        """Whether a batch is known to need the model's own forward for these adapters."""
        if isinstance(self.head, FSDPModule):  # all ranks have to gather the head alike, whichever rows they have
            return self._hosts
        if batch.twins is not None or batch.answer_ids is not None:
            return bool(names)
        return not all(self._by_token.get(module, True) for name in names for module in self._hosted(name))

    @property
    def uncut(self) -> bool:
        """Whether an adapter was found that needs the model's own forward."""
        return not all(self._by_token.values())

    def losses(self, hidden_ND: Tensor, batch: Batch, context: ForwardContext, names: frozenset[str]) -> Tensor | None:
        """Return the loss of each target [N]; None where an adapter of these names cannot be cut. hidden_ND: at each target."""
        owner = context.row_names(len(batch.lengths))
        row_N, place_N = (each.tolist() for each in rows_and_places(batch))
        if not all(self._cuts(name, hidden_ND, owner, row_N) for name in sorted(names)):
            return None
        ours = [at for at, row in enumerate(row_N) if owner[row] in names]
        if len(ours) == len(row_N):
            return self._in_chunks(hidden_ND, batch.target_ids, row_N, place_N, batch, context)
        own = torch.tensor(ours, device=hidden_ND.device)
        rest = torch.tensor([at for at, row in enumerate(row_N) if owner[row] not in names], device=own.device)
        rows, places = [row_N[at] for at in ours], [place_N[at] for at in ours]
        losses = self._in_chunks(hidden_ND[own], batch.target_ids[own], rows, places, batch, context)
        head, target = self.head, batch.target_ids[rest]
        others = linear_cross_entropy(hidden_ND[rest], head.weight, head.bias, target, self.transform)
        return torch.cat([losses, others])[torch.cat([own, rest]).argsort()]

    def _in_chunks(
        self, hidden_MD: Tensor, target_M: Tensor, row_M: Sequence[int], place_M: Sequence[int], batch: Batch,
        context: ForwardContext,
    ) -> Tensor:  # fmt: skip
        exact = torch.float64 if hidden_MD.dtype == torch.float64 else torch.float32
        size = max(1, ops.CHUNK_BYTES // (self.head.weight.shape[0] * exact.itemsize))
        found = []
        for start in range(0, len(row_M), size):
            chunk = slice(start, start + size)
            picked = picked_context(context, batch.lengths, row_M[chunk], place_M[chunk])
            given = (hidden_MD[chunk], target_M[chunk], picked)
            again = len(row_M) > size and torch.is_grad_enabled()
            found.append(checkpoint(self._chunk, *given, use_reentrant=False) if again else self._chunk(*given))
        return torch.cat(found)

    def _chunk(self, hidden_MD: Tensor, target_M: Tensor, context: ForwardContext) -> Tensor:
        logits = self._logits(hidden_MD, context)
        exact = torch.promote_types(logits.dtype, torch.float32)
        if self.transform.scale != 1.0:
            logits = logits * self.transform.scale
        if (cap := self.transform.cap) is not None:
            logits = (logits.to(exact) / cap).tanh() * cap
        return cross_entropy(logits, target_M)

    def _logits(self, hidden_MD: Tensor, context: ForwardContext) -> Tensor:
        with running(self.model, context):
            return self.head(hidden_MD[None])[0]

    def _cuts(self, name: str, hidden_ND: Tensor, owner: Sequence[str | None], row_N: Sequence[int]) -> bool:
        """Whether an adapter gives each token at the head the same whatever other tokens are there; tried once."""
        modules = self._hosted(name)
        if not all(module in self._by_token for module in modules):
            own = [at for at, row in enumerate(row_N) if owner[row] == name][:PROOF_TOKENS]
            if not own:
                return True
            self._by_token.update(dict.fromkeys(modules, self._try(name, hidden_ND[own].detach())))
        return all(self._by_token[module] for module in modules)

    def _hosted(self, name: str) -> list[nn.Module]:
        hooks = self.head._modules[CONTAINER].hooks
        return [each.adapter for table in (hooks.before, hooks.adapt) for each in table.get(name, ())]

    @torch.no_grad()
    def _try(self, name: str, hidden_MD: Tensor) -> bool:
        while len(hidden_MD) < PROOF_TOKENS:
            hidden_MD = torch.cat([hidden_MD, hidden_MD.roll(1, -1)])[:PROOF_TOKENS]
        count, seeds = len(hidden_MD), ((1,), (2,))
        losses: dict[str, dict[str, Tensor]] = {}
        row = ForwardContext(name, (count,), True, *seeds, losses=losses)
        try:
            whole = self._logits(hidden_MD, row)
            parts = []
            for at in (torch.arange(0, count, 2), torch.arange(1, count, 2)):
                picked = PickedForward(name, (len(at),), True, *seeds, places=(Places(at, count),))
                parts.append((at.to(whole.device), self._logits(hidden_MD[at], picked)))
        except GraftError:
            return False
        allowed = (1e-5 if whole.dtype in (torch.float32, torch.float64) else 2e-2) * (1.0 + float(whole.abs().max()))
        apart = max(float((whole[at] - part).abs().max()) for at, part in parts)
        return apart <= allowed and not any(losses.values())


def rows_and_places(batch: Batch) -> tuple[Tensor, Tensor]:
    """The row of each target, and the number of its token in the row, on the CPU; each [N]."""
    index, lengths = batch.target_index.cpu(), torch.tensor(batch.lengths)
    width = batch.input_ids.shape[1]
    starts = lengths.cumsum(0) - lengths if batch.layout == "flat" else torch.arange(len(lengths)) * width
    row_N = torch.searchsorted(starts, index, right=True) - 1
    return row_N, index - starts[row_N]


def picked_context(
    context: ForwardContext, lengths: Sequence[int], row_M: Sequence[int], place_M: Sequence[int]
) -> PickedForward:
    """The context of some tokens, which lie end to end. row_M: the row of each, those of a row side by side. place_M: its number there."""
    own: dict[int, list[int]] = {}
    for row, place in zip(row_M, place_M, strict=True):
        own.setdefault(row, []).append(place)
    rows = list(own)
    owner = context.row_names(len(lengths))
    names = tuple(owner[row] for row in rows)
    seeds, shared = context.seeds, context.pass_seeds
    return PickedForward(
        names[0] if len(set(names)) == 1 else names,
        lengths=tuple(len(each) for each in own.values()),
        flat=True,
        seeds=None if seeds is None else tuple(seeds[row] for row in rows),
        pass_seeds=None if shared is None else tuple(shared[row] for row in rows),
        places=tuple(Places(torch.tensor(each), lengths[row]) for row, each in own.items()),
    )

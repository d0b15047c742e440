"""Read the prompts of samples, so that their rows can join a running batch. n samples of a prompt share one reading of it.

Legend: B rows, V vocabulary, L tokens of a prompt.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from torch import Tensor, nn

from graft.generation.adapter_digests import AdapterDigests
from graft.generation.causal import CacheKind, CausalBatch
from graft.generation.choosing import prompt_scores
from graft.generation.prefixes import Prefix, PrefixCache
from graft.generation.requests import Request
from graft.generation.sampling import Sample
from graft.generation.seq2seq import Seq2SeqBatch, start_batch

PROMPTS = 8
"""Most prompts that are read in one pass, where rows that were read apart can join."""
Rows = CausalBatch | Seq2SeqBatch
Read = tuple[list[Sample], Rows, Tensor]
"""Samples, their rows, and the logits [B, V] of their first tokens."""


class Reader:
    """Reads prompts, or finds those that were read before."""

    def __init__(self, model: nn.Module, joins: bool, cache: CacheKind, prefixes: int) -> None:
        """joins: whether rows that were read apart can join. prefixes: most tokens of prompts that are kept."""
        self.model, self.joins = model, joins
        self.cache: CacheKind = cache
        self.prefixes, self.digests = PrefixCache(prefixes if joins else 0), AdapterDigests(model)

    def read(self, groups: Sequence[list[Sample]], room: int) -> Iterator[Read]:
        """Read the prompts of groups of samples; a group has one prompt. room: most new tokens of any of them.

        Prompts of similar lengths are read in one pass. One that is scored has a pass of its own, which makes the logits of all its tokens.
        """
        unread: list[list[Sample]] = []
        for group in groups:
            if group[0].sampling.scores_prompt:
                yield self._scored(group, room)
            elif (prefix := self._found(group[0].request)) is not None:
                for sample in group:
                    sample.cached = True
                yield self._taken([group], prefix.batch, prefix.logits_1V)
            else:
                unread.append(group)
        if self.joins:
            unread.sort(key=lambda group: len(group[0].request.ids))
        size = PROMPTS if self.joins else max(1, len(unread))
        for start in range(0, len(unread), size):
            yield self._together(unread[start : start + size], room)

    def _together(self, groups: Sequence[list[Sample]], room: int) -> Read:
        requests = [group[0].request for group in groups]
        batch = start_batch(self.model, requests, room, self.cache)
        logits_BV = batch.forward()
        if self.prefixes.tokens and isinstance(batch, CausalBatch):
            for row, request in enumerate(requests):
                own = batch.part([row]) if len(requests) > 1 else batch
                self._keep(request, Prefix(own, logits_BV[row : row + 1], None))
        return self._taken(groups, batch, logits_BV)

    def _scored(self, group: list[Sample], room: int) -> Read:
        request = group[0].request
        batch = CausalBatch(self.model, [request], room)
        logits_LV = batch.forward(every=True)[0]
        scores = prompt_scores(logits_LV, request.ids, group[0].sampling)
        for sample in group:
            sample.prompt = scores
        self._keep(request, Prefix(batch, logits_LV[-1:], scores))
        return self._taken([group], batch, logits_LV[-1:])

    def _taken(self, groups: Sequence[list[Sample]], batch: Rows, logits_BV: Tensor) -> Read:
        """Return a row of a batch for each sample; row i is that of group i. A batch that is kept stays as it is."""
        samples, index = (
            [each for group in groups for each in group],
            [row for row, own in enumerate(groups) for _ in own],
        )
        if isinstance(batch, CausalBatch) and (self.prefixes.tokens or len(index) > len(groups)):
            # The prompt may have been read under another name of the same adapter, which is gone.
            batch, logits_BV = batch.part(index), logits_BV[index]
            batch.adapters = [sample.request.adapter for sample in samples]
        return samples, batch, logits_BV

    def _found(self, request: Request) -> Prefix | None:
        return self.prefixes.find(self.digests.of(request.adapter), request.ids) if self.prefixes.tokens else None

    def _keep(self, request: Request, prefix: Prefix) -> None:
        if self.prefixes.tokens:
            self.prefixes.keep(self.digests.of(request.adapter), request.ids, prefix)

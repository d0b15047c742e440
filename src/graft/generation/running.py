"""A running batch: rows of any adapters join and leave it at any step, with one KV cache (continuous batching).

One step reads the prompts that there is room for, joins their rows to the batch, chooses one token for each row, and feeds the tokens of
the rows that go on. A row's tokens do not depend on its company: each adapter runs on its own rows, and each row draws from a generator
of its own. Prompts wait in the order in which they came. n samples of a prompt share one reading of it.

Where rows cannot join one another (a cache that is not keys and values or does not grow, a rotary embedding that changes with the
longest row, an encoder), those that begin together stay together, and others wait until the last of them has left.
"""

from __future__ import annotations

import sys
from collections import deque
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from graft.bases.context import context_length
from graft.errors import GraftError
from graft.generation.causal import CacheKind, CausalBatch
from graft.generation.choosing import at_least_float32, choose, top_of
from graft.generation.decoding import Decoding
from graft.generation.joining import joinable
from graft.generation.reading import Reader, Rows
from graft.generation.requests import Request, limits
from graft.generation.sampling import End, Sample, Sampling
from graft.generation.text_stream import TextStream
from graft.injection.modes import evaluation_mode
from graft.injection.state import unwrapped


class RunningBatch:
    """Answers requests that come at any time. It belongs to one thread."""

    def __init__(
        self,
        model: nn.Module,
        *,
        rows: int | None = None,
        token_budget: int = 65_536,
        prefixes: int = 0,
        cache: CacheKind = "dynamic",
        at_once: int = 1,
    ) -> None:
        """rows: most rows at once (1 where rows cannot join); None is as many as the budget has room for, where the caller adds only
        requests that may share a batch. token_budget: most columns of the cache times rows. prefixes: most tokens of prompts that are
        kept. cache: see `causal`. at_once: prompts that wait until there is room for so many, since each time that rows join, those
        that run are copied.
        """
        root: Any = unwrapped(model)
        self.model, self.device, self.token_budget, self.at_once = model, root.device, token_budget, at_once
        self.joins = cache == "dynamic" and joinable(root)
        self.rows = sys.maxsize if rows is None else rows if self.joins else 1
        self.reader = Reader(model, self.joins, cache, prefixes)
        self.waiting: deque[list[Sample]] = deque()
        self.samples: list[Sample] = []
        """The running rows, in the order of the batch."""
        self._limits: dict[Sample, int] = {}
        self._generators: list[torch.Generator] = []
        self._batch: Rows | None = None
        self._logits_BV: Tensor | None = None

    def add(self, request: Request, sampling: Sampling, tokenizer: Any = None, owner: Any = None) -> list[Sample]:
        """Queue a request and return its samples. tokenizer: needed for stop texts.

        Raises `GraftError` for a prompt without tokens, for an adapter that is not attached, and for more samples than rows.
        """
        if sampling.n > self.rows and self.joins:
            raise GraftError(f"n is {sampling.n}, but a batch has at most {self.rows} rows")
        if sampling.stop and tokenizer is None:
            raise GraftError("stop texts need a tokenizer")
        (limit,) = limits(self.model, [request], Decoding(max_new_tokens=max(1, sampling.max_tokens)))
        if not sampling.max_tokens and len(request.ids) == context_length(self.model, request.adapter):
            limit = 1  # a prompt that is only scored may fill the context
        found = []
        for index in range(sampling.n):
            stream = None if tokenizer is None else TextStream(tokenizer, sampling.stop)
            found.append(Sample(request, sampling, index, stream=stream, owner=owner))
            self._limits[found[-1]] = limit
        if not limit:
            for sample in found:
                self._finish(sample, "no_room")
        else:  # where rows cannot join, each sample reads the prompt itself
            self.waiting.extend([found] if self.joins else [[each] for each in found])
        return found

    @property
    def idle(self) -> bool:
        """Whether there is nothing to do."""
        return not self.samples and not self.waiting

    def drop(self, samples: Sequence[Sample]) -> None:
        """End these samples now; their rows are free at the next step."""
        gone = {id(each) for each in samples}
        for sample in samples:
            if sample.end is None:
                self._finish(sample, "dropped")
        self.waiting = deque(
            left for group in self.waiting if (left := [each for each in group if id(each) not in gone])
        )
        self._keep([row for row, each in enumerate(self.samples) if id(each) not in gone])

    def step(self) -> list[Sample]:
        """Take one step and return the samples that changed in it: each has one token more, or has ended."""
        with evaluation_mode(self.model), torch.no_grad():
            ended = self._admit()
            changed = list(self.samples)
            if self._logits_BV is not None:
                tokens_B = self._choose(self._logits_BV)
                left = [row for row, sample in enumerate(self.samples) if sample.end is None]
                self._keep(left)
                if self._batch is not None:
                    self._logits_BV = self._batch.forward(tokens_B if len(left) == len(tokens_B) else tokens_B[left])
        return ended + changed

    def _choose(self, logits_BV: Tensor) -> Tensor:
        """Choose the next token of every row, and note it in its sample."""
        bad = ~(logits_BV.amax(-1) < float("inf"))  # the largest of numbers among which one is NaN is NaN
        if (failed := bad.tolist()) and any(failed):
            logits_BV = logits_BV.masked_fill(bad[:, None], 0.0)
        settings = [sample.sampling for sample in self.samples]
        tokens_B = choose(logits_BV, settings, self._generators)
        scored = [row for row, each in enumerate(settings) if each.scores]
        own: dict[int, tuple[Tensor, float]] = {}
        if scored:
            logprobs_SV = at_least_float32(logits_BV[scored]).log_softmax(-1)
            chosen = logprobs_SV.gather(1, tokens_B[scored][:, None])[:, 0].tolist()
            own = dict(zip(scored, zip(logprobs_SV, chosen, strict=True), strict=True))
        for row, (sample, token) in enumerate(zip(self.samples, tokens_B.tolist(), strict=True)):
            if failed[row]:
                sample.problem = "the model's output is not finite"
                self._finish(sample, "failed")
                continue
            sample.ids.append(token)
            if row in own:
                logprobs_V, logprob = own[row]
                sample.logprobs.append(logprob)
                if sample.sampling.top_logprobs:
                    sample.top.append(top_of(logprobs_V, sample.sampling.top_logprobs))
            if token in sample.request.stop_ids or (sample.stream is not None and sample.stream.add(token)):
                self._finish(sample, "stop")
            elif len(sample.ids) >= self._limits[sample]:
                self._finish(sample, "length")
        return tokens_B

    def _admit(self) -> list[Sample]:
        """Read the prompts that there is room for and join their rows to the batch. Returns the samples that need no token."""
        groups: list[list[Sample]] = []
        while self.waiting and self._has_room(self.waiting[0], [each for group in groups for each in group]):
            groups.append(self.waiting.popleft())
        if self.samples and self.waiting and len(groups) < self.at_once:
            self.waiting.extendleft(reversed(groups))
            return []
        if not groups:
            return []
        parts: list[tuple[Any, Tensor]] = []
        if self._batch is not None and self._logits_BV is not None:
            parts.append((self._batch, self._logits_BV))
        room = max(self._limits[group[0]] for group in groups)
        for samples, batch, logits_BV in self.reader.read(groups, room):
            parts.append((batch, logits_BV))
            self.samples += samples
            self._generators += [
                torch.Generator(self.device).manual_seed(each.sampling.seed + each.index) for each in samples
            ]
        self._batch, self._logits_BV = parts[0]
        if len(parts) > 1:  # all at once, so that every row is copied once
            parts[0][0].join([batch for batch, _ in parts[1:]])
            self._logits_BV = torch.cat([logits_BV for _, logits_BV in parts])
        ended = [sample for group in groups for sample in group if not sample.sampling.max_tokens]
        for sample in ended:  # only the prompt is scored
            self._finish(sample, "length")
        # Rows of one adapter beside each other are a slice of the batch, and need not be gathered at every layer.
        left = [row for row, each in enumerate(self.samples) if each.end is None]
        self._keep(sorted(left, key=lambda row: self.samples[row].request.adapter or ""))
        return ended

    def _has_room(self, group: Sequence[Sample], joining: Sequence[Sample]) -> bool:
        if self.samples and not self.joins:
            return False
        together = [*self.samples, *joining, *group]
        longest = max(len(each.request.ids) + self._limits[each] for each in together)
        fits = len(together) <= self.rows and len(together) * longest <= self.token_budget
        return fits or not (self.samples or joining)

    def _keep(self, rows: Sequence[int]) -> None:
        """Go on with these rows of the batch, in this order."""
        if list(rows) == list(range(len(self.samples))):
            return
        self.samples = [self.samples[row] for row in rows]
        self._generators = [self._generators[row] for row in rows]
        if not rows or self._batch is None or self._logits_BV is None:
            self._batch = self._logits_BV = None
            return
        index_B = torch.tensor(rows, device=self.device)
        self._batch.select(index_B)
        if self.joins and isinstance(self._batch, CausalBatch):
            self._batch.trim()
        self._logits_BV = self._logits_BV[index_B]

    def _finish(self, sample: Sample, end: End) -> None:
        sample.end = end
        self._limits.pop(sample, None)
        if sample.stream is not None:
            sample.stream.finish()

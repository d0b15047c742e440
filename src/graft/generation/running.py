"""A running batch: rows of any adapters join and leave it at any step, with one KV cache (continuous batching).

One step reads the prompts that there is room for, joins their rows to the batch, chooses one token for each row, and feeds the tokens of
the rows that go on. A row's tokens do not depend on its company: each adapter runs on its own rows, and each row draws from a generator
of its own. Prompts wait in the order in which they came. n samples of a prompt share one reading of it.

Where rows cannot share passes (a cache that is not keys and values, a rotary embedding that changes with the longest row), the batch
holds one row at a time.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from graft.architectures.rope import company_of
from graft.bases.context import context_length
from graft.errors import GraftError
from graft.generation.adapter_digests import AdapterDigests
from graft.generation.causal import CausalBatch
from graft.generation.choosing import at_least_float32, choose, prompt_scores, top_of
from graft.generation.decoding import Decoding
from graft.generation.joining import joinable
from graft.generation.prefixes import Prefix, PrefixCache
from graft.generation.requests import Request, limits
from graft.generation.sampling import End, Sample, Sampling
from graft.generation.text_stream import TextStream
from graft.injection.modes import evaluation_mode
from graft.injection.state import unwrapped

PROMPTS = 8
"""Most prompts that are read in one pass."""


class RunningBatch:
    """Answers requests that come at any time. It belongs to one thread."""

    def __init__(self, model: nn.Module, *, rows: int = 64, token_budget: int = 65_536, prefixes: int = 0) -> None:
        """rows: most rows at once. token_budget: most columns of the cache times rows. prefixes: most tokens of prompts that are kept.

        Raises `GraftError` for an encoder-decoder.
        """
        root: Any = unwrapped(model)
        if getattr(root.config, "is_encoder_decoder", False):
            raise GraftError(f"{type(root).__name__} is an encoder-decoder: a running batch takes causal models")
        self.model, self.device, self.token_budget = model, root.device, token_budget
        self.shares = joinable(root.config.get_text_config()) and not company_of(root)
        self.rows = rows if self.shares else 1
        self.prefixes, self.digests = PrefixCache(prefixes if self.shares else 0), AdapterDigests(model)
        self.waiting: deque[list[Sample]] = deque()
        self.samples: list[Sample] = []
        """The running rows, in the order of the batch."""
        self._limits: dict[Sample, int] = {}
        self._generators: list[torch.Generator] = []
        self._batch: CausalBatch | None = None
        self._logits_BV: Tensor | None = None

    def add(self, request: Request, sampling: Sampling, tokenizer: Any = None, owner: Any = None) -> list[Sample]:
        """Queue a request and return its samples. tokenizer: needed for stop texts.

        Raises `GraftError` for a prompt without tokens, for an adapter that is not attached, and for more samples than rows.
        """
        if sampling.n > self.rows and self.shares:
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
        else:  # without shared passes each sample reads the prompt itself
            self.waiting.extend([found] if self.shares else [[each] for each in found])
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
        bad = logits_BV.isnan().any(-1) | (logits_BV == float("inf")).any(-1)
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
        if not groups:
            return []
        # The new rows are joined to one another first, so that the cache of those that run is copied once.
        running, logits_BV = self._batch, self._logits_BV
        self._batch = self._logits_BV = None
        for group, prefix, cached in self._read(groups):
            self._join(group, prefix, cached)
        if running is not None and logits_BV is not None and self._batch is not None and self._logits_BV is not None:
            running.join(self._batch)
            self._batch, self._logits_BV = running, torch.cat([logits_BV, self._logits_BV])
        ended = [sample for group in groups for sample in group if not sample.sampling.max_tokens]
        for sample in ended:  # only the prompt is scored
            self._finish(sample, "length")
        # Rows of one adapter beside each other are a slice of the batch, and need not be gathered at every layer.
        left = [row for row, each in enumerate(self.samples) if each.end is None]
        self._keep(sorted(left, key=lambda row: self.samples[row].request.adapter or ""))
        return ended

    def _has_room(self, group: Sequence[Sample], joining: Sequence[Sample]) -> bool:
        together = [*self.samples, *joining, *group]
        longest = max(len(each.request.ids) + self._limits[each] for each in together)
        fits = len(together) <= self.rows and len(together) * longest <= self.token_budget
        return fits or not (self.samples or joining)

    def _read(self, groups: Sequence[list[Sample]]) -> Iterator[tuple[list[Sample], Prefix, bool]]:
        """Yield the samples of each prompt, the prompt as it was read, and whether the prefix cache had it.

        Prompts of similar lengths are read in one pass. One that is scored has a pass of its own, which makes the logits of all its tokens.
        """
        unread: list[list[Sample]] = []
        for group in groups:
            request, sampling = group[0].request, group[0].sampling
            prefix = None if sampling.scores_prompt else self._find(request)
            if prefix is not None:
                yield group, prefix, True
            elif sampling.scores_prompt:
                batch = CausalBatch(self.model, [request], self._limits[group[0]])
                logits_LV = batch.forward(every=True)[0]
                scores = prompt_scores(logits_LV, request.ids, sampling)
                yield group, self._kept(request, Prefix(batch, logits_LV[-1:], scores)), False
            else:
                unread.append(group)
        unread.sort(key=lambda group: len(group[0].request.ids))
        for start in range(0, len(unread), PROMPTS):
            some = unread[start : start + PROMPTS]
            requests = [group[0].request for group in some]
            batch = CausalBatch(self.model, requests, max(self._limits[group[0]] for group in some))
            logits_BV = batch.forward()
            for row, (group, request) in enumerate(zip(some, requests, strict=True)):
                own = batch.part(torch.tensor([row], device=self.device)) if len(some) > 1 else batch
                yield group, self._kept(request, Prefix(own, logits_BV[row : row + 1], None)), False

    def _find(self, request: Request) -> Prefix | None:
        return self.prefixes.find(self.digests.of(request.adapter), request.ids) if self.prefixes.tokens else None

    def _kept(self, request: Request, prefix: Prefix) -> Prefix:
        if self.prefixes.tokens:
            self.prefixes.keep(self.digests.of(request.adapter), request.ids, prefix)
        return prefix

    def _join(self, group: Sequence[Sample], prefix: Prefix, cached: bool) -> None:
        """Join one row for each sample of a prompt to the batch."""
        rows = torch.zeros(len(group), dtype=torch.long, device=self.device)
        joining, logits_BV = prefix.batch.part(rows) if self.shares else prefix.batch, prefix.logits_1V[rows]
        # The prompt may have been read under another name of the same adapter, which is gone.
        joining.adapters = [sample.request.adapter for sample in group]
        if self._batch is None or self._logits_BV is None:
            self._batch, self._logits_BV = joining, logits_BV
        else:
            self._batch.join(joining)
            self._logits_BV = torch.cat([self._logits_BV, logits_BV])
        for sample in group:
            sample.prompt, sample.cached = prefix.scores if sample.sampling.scores_prompt else None, cached
            seed = sample.sampling.seed + sample.index
            self._generators.append(torch.Generator(self.device).manual_seed(seed))
            self.samples.append(sample)

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
        self._batch.trim()
        self._logits_BV = self._logits_BV[index_B]

    def _finish(self, sample: Sample, end: End) -> None:
        sample.end = end
        self._limits.pop(sample, None)
        if sample.stream is not None:
            sample.stream.finish()

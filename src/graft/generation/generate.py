"""Generate answers to many prompts at once: in a running batch, which the server uses too, or by beam search.

The base runs once on all rows of a batch and each adapter on its own rows (`causal`, `seq2seq`). In float32, greedy answers
equal those of one prompt at a time, which `selfcheck` verifies.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from torch import nn

from graft.distributed.group import ALONE, Group
from graft.generation.beams import beam_search
from graft.generation.causal import CacheKind, check_cache
from graft.generation.reading import PROMPTS
from graft.generation.requests import Decoding, Generated, Request, apart, limits, plan
from graft.generation.running import RunningBatch
from graft.generation.sampling import Sampling
from graft.injection.modes import evaluation_mode


def generate(
    model: nn.Module,
    requests: Sequence[Request],
    decoding: Decoding | None = None,
    *,
    token_budget: int = 8192,
    cache: CacheKind = "dynamic",
    group: Group = ALONE,
) -> Iterator[tuple[int, Generated]]:
    """Answer all requests. Yields (number of the request, its answer) as they end, in no particular order.

    token_budget: most tokens of a batch, counting prompts and the room for answers. cache: see `causal`. group: the ranks that share
    the batches, with the same requests; each yields the answers of its own.
    Raises `GraftError` for a prompt without tokens, for an adapter that is not attached, and for a cache that the model does
    not support.
    """
    decoding = decoding or Decoding()
    check_cache(model, cache)
    limit = limits(model, requests, decoding)
    for number in (number for number in range(len(requests)) if not limit[number] and group.leads):
        yield number, Generated((), "no_room")
    batches = group.turns(plan(requests, limit, decoding, token_budget, apart(model, requests, limit)))
    if decoding.beams == 1:
        yield from _run(model, requests, decoding, token_budget, cache, batches)
        return
    for batch in batches:
        chosen, allowed = [requests[number] for number in batch], [limit[number] for number in batch]
        with evaluation_mode(model):
            answers = beam_search(model, chosen, allowed, decoding, cache)
        yield from zip(batch, answers, strict=True)


def _run(
    model: nn.Module,
    requests: Sequence[Request],
    decoding: Decoding,
    token_budget: int,
    cache: CacheKind,
    batches: Iterator[Sequence[int]],
) -> Iterator[tuple[int, Generated]]:
    """Answer requests in a running batch. batches: numbers of requests that may run together, taken when they can begin."""
    running, left = RunningBatch(model, token_budget=token_budget, cache=cache, at_once=PROMPTS), True
    while left or not running.idle:
        if left and (len(running.waiting) < PROMPTS if running.joins else running.idle):
            left = (batch := next(batches, None)) is not None
            for number in batch or ():
                running.add(requests[number], sampling_of(decoding), owner=number)
        for sample in running.step():
            if sample.end is not None:
                reason = "stopped" if sample.end == "stop" else "truncated"
                yield sample.owner, Generated(tuple(sample.answer_ids), reason)


def stream(model: nn.Module, request: Request, decoding: Decoding | None = None) -> Iterator[int]:
    """Answer one request token by token, without the stop token. Yields nothing if the prompt fills the context."""
    running = RunningBatch(model)
    (sample,) = running.add(request, sampling_of(decoding or Decoding()))
    shown = 0
    while not running.idle:
        running.step()
        yield from sample.answer_ids[shown:]
        shown = len(sample.answer_ids)


def sampling_of(decoding: Decoding) -> Sampling:
    """Return greedy decoding, or sampling, as settings of a request in a running batch."""
    return Sampling(decoding.max_new_tokens, decoding.temperature, top_p=decoding.top_p, seed=decoding.seed)

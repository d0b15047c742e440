"""Samples for the training API: what a client asks as a request for the running batch, and what came of it as a message."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from typing import Any

import numpy as np

from graft.bases import Base
from graft.bases.context import context_length
from graft.bases.tokens import refuse_unknown
from graft.data.encoding import facts_of
from graft.errors import GraftError
from graft.generation.requests import Request
from graft.generation.sampling import Sample, Sampling, Top
from graft.serving.tinker.bodies import SampleBody
from graft.serving.tinker.messages import SampleResponse
from graft.serving.tinker.targets import MOST_CELLS, fill_draws
from graft.serving.tinker.tensors import as_float32, as_int32

NOT_THERE = -99999.0
"""The log-probability in a cell of a table that holds no token."""
STOP, LENGTH = 0, 1


def request_of(body: SampleBody, base: Base, adapter: str | None, seed: int) -> tuple[Request, Sampling]:
    """Return the request and its settings. seed: where the client gives none.

    Raises `GraftError` for what Graft does not support, for tokens that the base does not have, and for a prompt that leaves no room.
    """
    params, ids, targets = body.sampling_params, body.prompt.tokens, body.target_prompt_logprobs
    if body.record_stability_info:
        raise GraftError("record_stability_info is not supported here: leave it out")
    if not ids or min(ids) < 0:
        raise GraftError("the prompt must hold tokens, with ids from 0 on")
    rows = () if targets is None else targets.rows(len(ids))
    highest = max(chain(ids, *rows))
    refuse_unknown(base.model, base.name, base.tokenizer, highest, prompt=True)
    if len(ids) * body.prompt_alt_tokens_k > MOST_CELLS:
        raise GraftError(f"prompt_alt_tokens_k times the tokens of the prompt may be {MOST_CELLS:,} at most")
    length = context_length(base.model, adapter)
    room = None if length is None else length - len(ids)
    if room is not None and room < 0 or room == 0 and not body.prompt_logprobs:
        raise GraftError(
            f"the prompt has {len(ids)} tokens, and the context is {length}: there is no room for an answer"
        )
    if params.max_tokens is None and room is None:
        raise GraftError("max_tokens is needed: this base has no limit of its own")
    stop = params.stop
    texts = (stop,) if isinstance(stop, str) else tuple(each for each in stop or () if isinstance(each, str))
    ends = [facts_of(base.tokenizer).eos_id] if stop is None else [each for each in stop if isinstance(each, int)]
    settings = Sampling(
        max_tokens=min(each for each in (params.max_tokens, room) if each is not None),
        temperature=params.temperature,
        top_k=max(0, params.top_k),
        top_p=params.top_p,
        seed=seed if params.seed is None else params.seed,
        n=body.num_samples,
        stop=texts,
        logprobs=True,
        top_logprobs=body.topk_sample_logprobs,
        prompt_logprobs=bool(body.prompt_logprobs),
        top_prompt_logprobs=body.topk_prompt_logprobs,
        prompt_targets=rows,
        prompt_draws=body.prompt_alt_tokens_k,
    )
    return Request(tuple(ids), adapter, frozenset(ends)), settings


def response_of(body: SampleBody, samples: Sequence[Sample]) -> bytes:
    """Return the answer. Raises `GraftError` if a sample failed."""
    response = SampleResponse()
    for sample in samples:
        if sample.end not in ("stop", "length"):
            raise GraftError(sample.problem or f"the sample ended as {sample.end}")
        made = response.sequences.add(stop_reason=STOP if sample.end == "stop" else LENGTH, tokens=as_int32(sample.ids))
        made.logprobs = as_float32(sample.logprobs)
        if width := body.topk_sample_logprobs:
            _fill(made.topk_sampled_logprobs, sample.top, width)
    response.prompt_cache_hit_tokens = len(samples[0].request.ids) if samples[0].cached else 0
    if (scores := samples[0].prompt) is not None:
        hidden = max(1, len(scores.logprobs) - (body.prompt_logprobs_last_n or len(scores.logprobs)))
        if body.prompt_logprobs:
            shown = [None] * hidden + list(scores.logprobs[hidden:])
            response.prompt_logprobs = as_float32([np.nan if each is None else each for each in shown])
        if width := body.topk_prompt_logprobs:
            _fill(response.topk_prompt_logprobs, [()] * hidden + [each or () for each in scores.top[hidden:]], width)
        if body.target_prompt_logprobs is not None:
            body.target_prompt_logprobs.fill(response.target_prompt_logprobs, scores)
        if body.prompt_alt_tokens_k:
            fill_draws(response.prompt_alt_tokens, scores, body.prompt_alt_tokens_k)
    return response.SerializeToString()


def _fill(message: Any, tops: Sequence[Top], width: int) -> None:
    """Write a table [length, width] of tokens and their log-probabilities, likeliest first."""
    rows = [[*top[:width], *[(0, NOT_THERE)] * (width - len(top))] for top in tops]
    message.token_ids = as_int32([token for row in rows for token, _ in row])
    message.logprobs = as_float32([score for row in rows for _, score in row])
    message.k, message.length = width, len(rows)

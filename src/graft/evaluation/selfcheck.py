"""Prove before a run that batches change nothing: greedy answers of a few prompts, together and one at a time.

In float32 two matrix products of different batch sizes differ in their last bits, so where two tokens are equally likely up to
that, either is right: the first token that differs must lose to the other by less than `TIE`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import nn

from graft.errors import GraftError
from graft.evaluation.batching import evaluating, left_padded, routed
from graft.evaluation.generation import generate
from graft.evaluation.requests import Decoding, Request
from graft.state import unwrapped

TIE = 1e-3
"""Difference of logits, relative to the largest, below which two tokens count as equally likely."""


def self_check(
    model: nn.Module, requests: Sequence[Request], *, prompts: int = 8, new_tokens: int = 16, token_budget: int = 8192
) -> int:
    """How many requests were compared: a few of unequal length, of every adapter in turn. 0 where weights are not float32.

    Raises `GraftError` with the first request whose answer in the batch is not its answer alone.
    """
    if next(unwrapped(model).parameters()).dtype != torch.float32:
        return 0
    chosen = _spread(requests, prompts)
    decoding = Decoding(max_new_tokens=new_tokens)
    together = dict(generate(model, chosen, decoding, token_budget=token_budget))
    for number, request in enumerate(chosen):
        ((_, alone),) = generate(model, [request], decoding, token_budget=token_budget)
        first, second = (*together[number].ids, None), (*alone.ids, None)
        if first == second or _is_tie(model, request, first, second):
            continue
        raise GraftError(
            f"batched generation is wrong for this model: a prompt of {len(request.ids)} tokens "
            f"({'the base' if request.adapter is None else f'adapter {request.adapter!r}'}) is answered {first[:-1]} in a batch "
            f"and {second[:-1]} alone. Run with a token budget of 1, which takes one prompt at a time"
        )
    return len(chosen)


def _spread(requests: Sequence[Request], count: int) -> list[Request]:
    """Requests of all lengths and adapters: evenly spaced in the order of lengths, adapters taken in turn."""
    by_adapter: dict[str | None, list[Request]] = {}
    for request in sorted(requests, key=lambda request: len(request.ids)):
        by_adapter.setdefault(request.adapter, []).append(request)
    each = max(2, count // len(by_adapter))
    return [
        one[round(place * (len(one) - 1) / max(1, min(each, len(one)) - 1))]
        for one in by_adapter.values()
        for place in range(min(each, len(one)))
    ]


def _is_tie(model: nn.Module, request: Request, first: tuple[int | None, ...], second: tuple[int | None, ...]) -> bool:
    """Whether the two answers part at a token that is as likely as the other."""
    at = next(index for index, pair in enumerate(zip(first, second, strict=False)) if pair[0] != pair[1])
    seen = replace(request, ids=request.ids + tuple(token for token in second[:at] if token is not None))
    ids, mask = left_padded([seen], unwrapped(model).device)  # pyright: ignore[reportArgumentType]
    with torch.no_grad(), evaluating(model), routed(model, [request.adapter]):
        logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits[0, -1].float()
    both = [max(request.stop_ids, key=lambda stop: logits[stop]) if t is None else t for t in (first[at], second[at])]
    return bool((logits[both[0]] - logits[both[1]]).abs() <= TIE * (1 + logits.abs().max()))

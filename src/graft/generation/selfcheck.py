"""Check before an evaluation that batching does not change results: a few prompts or choices run in a batch and one at a time.

Generated answers are compared greedily and in float32 only. Even there, matrix products of different batch sizes differ in
their last bits, so two tokens that are almost equally likely may swap: where two answers differ first, the logits of the two
tokens must be within `TIE` of one another. In lower precision rounding alone makes answers differ, so nothing is checked.

Rounding moves log-likelihoods only a little, so these are compared in any precision, within `NEAR`.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain

import torch
from torch import nn

from graft.data.samples import Example
from graft.errors import GraftError
from graft.generation.causal import CacheKind
from graft.generation.generate import generate
from graft.generation.likelihood import fitting_examples, likelihoods
from graft.generation.requests import Decoding, Request
from graft.generation.seq2seq import start_batch
from graft.injection.modes import evaluation_mode
from graft.injection.state import unwrapped

TIE = 1e-3
"""Two tokens count as equally likely if their logits differ by at most this, relative to 1 + the largest logit."""
NEAR, NEAR_IN_LOW_PRECISION = 1e-3, 0.05
"""How much two log-likelihoods of one text may differ, relative to 1 nat + their size, in float32 and in lower precision. On
models of two to five layers, batches of forty questions moved them by at most 1e-6 in float32 and 0.02 in bfloat16."""


def self_check(
    model: nn.Module,
    requests: Sequence[Request],
    *,
    prompts: int = 8,
    new_tokens: int = 16,
    token_budget: int = 8192,
    cache: CacheKind = "dynamic",
) -> int:
    """Compare the answers to a few requests in a batch and alone; return how many requests were compared.

    The requests have different lengths and cover every adapter. The result is 0 if the weights are not float32. cache: the
    batch's; requests that run alone have a dynamic cache.
    Raises `GraftError` with the first request that is answered differently in the batch.
    """
    if not _exact(model):
        return 0
    chosen = [requests[place] for place in _spread([(each.adapter, len(each.ids)) for each in requests], prompts)]
    decoding = Decoding(max_new_tokens=new_tokens)
    together = dict(generate(model, chosen, decoding, token_budget=token_budget, cache=cache))
    for number, request in enumerate(chosen):
        ((_, alone),) = generate(model, [request], decoding, token_budget=token_budget)
        # None stands for the end of an answer, so that an answer that only ends earlier differs too.
        first, second = (*together[number].ids, None), (*alone.ids, None)
        if first == second or _is_tie(model, request, first, second):
            continue
        raise GraftError(
            f"batched generation is wrong for this model: a prompt of {len(request.ids)} tokens "
            f"({_who(request.adapter)}) gets the answer {first[:-1]} in a batch "
            f"and {second[:-1]} alone. Run with a token budget of 1, which takes one prompt at a time"
        )
    return len(chosen)


def likelihood_check(
    model: nn.Module,
    questions: Sequence[Sequence[Example]],
    adapters: Sequence[str | None],
    *,
    count: int = 8,
    token_budget: int = 8192,
) -> int:
    """Compare the log-likelihoods of the choices of a few questions in a batch and alone; return how many questions were compared.

    questions: the choices of each question. adapters: one per question. Only questions that fit into the context are compared.
    Raises `GraftError` with the first choice that has another log-likelihood in the batch.
    """
    longest = [max(map(len, question)) for question in questions]
    fits = fitting_examples(model, longest, adapters)
    chosen = [fits[place] for place in _spread([(adapters[place], longest[place]) for place in fits], count)]
    # One row per choice, under the adapter of its question.
    who = [adapters[place] for place in chosen for _ in questions[place]]
    examples = list(chain.from_iterable(questions[place] for place in chosen))
    together = likelihoods(model, examples, who, token_budget=token_budget)
    near = NEAR if _exact(model) else NEAR_IN_LOW_PRECISION
    for example, adapter, value in zip(examples, who, together, strict=True):
        (alone,) = likelihoods(model, [example], [adapter], token_budget=1)
        assert value is not None and alone is not None  # they fit into the context
        if abs(value - alone) <= near * (1 + abs(alone)):
            continue
        raise GraftError(
            f"batched likelihoods are wrong for this model: a choice of {len(example)} tokens with its question "
            f"({_who(adapter)}) has log-likelihood {value:.4f} in a batch and {alone:.4f} alone. Run with a token budget of "
            "1, which takes one choice at a time"
        )
    return len(chosen)


def _exact(model: nn.Module) -> bool:
    return next(unwrapped(model).parameters()).dtype == torch.float32


def _who(adapter: str | None) -> str:
    return "the base" if adapter is None else f"adapter {adapter!r}"


def _spread(requests: Sequence[tuple[str | None, int]], count: int) -> list[int]:
    """Choose about `count` of the requests (adapter, length) so that every adapter and all lengths occur; return their indices.

    Each adapter gets at least two: its shortest and its longest. The others are evenly spaced in the order of lengths.
    """
    by_adapter: dict[str | None, list[int]] = {}
    for place in sorted(range(len(requests)), key=lambda place: requests[place][1]):
        by_adapter.setdefault(requests[place][0], []).append(place)
    each = max(2, count // max(1, len(by_adapter)))
    return [
        one[round(place * (len(one) - 1) / max(1, min(each, len(one)) - 1))]
        for one in by_adapter.values()
        for place in range(min(each, len(one)))
    ]


def _is_tie(model: nn.Module, request: Request, first: tuple[int | None, ...], second: tuple[int | None, ...]) -> bool:
    """Whether the two tokens at which the answers first differ are equally likely."""
    at = next(index for index, pair in enumerate(zip(first, second, strict=False)) if pair[0] != pair[1])
    # Feed the tokens that both answers share; the logits after them are those that decided between the two.
    batch = start_batch(model, [request], at + 1)
    with evaluation_mode(model):
        logits = batch.forward()
        for token in second[:at]:
            logits = batch.forward(torch.tensor([token], device=batch.device))
    logits = logits[0].float()
    # Where an answer ended (None), its token was the likeliest of the stop tokens.
    both = [max(request.stop_ids, key=lambda stop: logits[stop]) if t is None else t for t in (first[at], second[at])]
    return bool((logits[both[0]] - logits[both[1]]).abs() <= TIE * (1 + logits.abs().max()))

"""Prove before a run that batches change nothing: a few prompts or choices, together and one at a time.

Answers are greedy. In float32 two matrix products of different batch sizes differ in their last bits, so where two tokens are
equally likely up to that, either is right: the first token that differs must lose to the other by less than `TIE`. In lower
precision rounding alone parts two answers for good, and nothing is proved.

Log-likelihoods, which rounding moves but does not part, are compared in any precision, within `NEAR`.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain

import torch
from torch import nn

from graft.data.samples import Example
from graft.errors import GraftError
from graft.generation.batching import evaluating
from graft.generation.generate import generate
from graft.generation.likelihood import fitting, likelihoods
from graft.generation.requests import Decoding, Request
from graft.generation.rows import CacheKind
from graft.generation.seq2seq_rows import rows_of
from graft.injection.state import unwrapped

TIE = 1e-3
"""Difference of logits, relative to the largest, below which two tokens count as equally likely."""
NEAR, NEAR_IN_LOW_PRECISION = 1e-3, 0.05
"""How far two log-likelihoods of one text may lie apart, relative to 1 nat and their size, in float32 and below it. On models of
two to five layers batches of forty questions moved them by at most 1e-6 in float32 and by 0.02 in bfloat16."""


def self_check(
    model: nn.Module,
    requests: Sequence[Request],
    *,
    prompts: int = 8,
    new_tokens: int = 16,
    token_budget: int = 8192,
    cache: CacheKind = "dynamic",
) -> int:
    """How many requests were compared: a few of unequal length, of every adapter in turn. 0 where weights are not float32.

    cache: of the batch; one at a time the cache grows.

    Raises `GraftError` with the first request whose answer in the batch is not its answer alone.
    """
    if not _exact(model):
        return 0
    chosen = [requests[place] for place in _spread([(each.adapter, len(each.ids)) for each in requests], prompts)]
    decoding = Decoding(max_new_tokens=new_tokens)
    together = dict(generate(model, chosen, decoding, token_budget=token_budget, cache=cache))
    for number, request in enumerate(chosen):
        ((_, alone),) = generate(model, [request], decoding, token_budget=token_budget)
        first, second = (*together[number].ids, None), (*alone.ids, None)
        if first == second or _is_tie(model, request, first, second):
            continue
        raise GraftError(
            f"batched generation is wrong for this model: a prompt of {len(request.ids)} tokens "
            f"({_who(request.adapter)}) is answered {first[:-1]} in a batch "
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
    """How many questions were compared: the log-likelihoods of their choices all together, and of each choice alone.

    questions: the choices of each; adapters: of each question. Only questions that fit into the context are compared.
    Raises `GraftError` with the first choice whose log-likelihood in the batch is not its own.
    """
    longest = [max(map(len, question)) for question in questions]
    fits = fitting(model, longest, adapters)
    chosen = [fits[place] for place in _spread([(adapters[place], longest[place]) for place in fits], count)]
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
            f"batched likelihoods are wrong for this model: a choice of {len(example)} tokens, its question counted "
            f"({_who(adapter)}), has log-likelihood {value:.4f} in a batch and {alone:.4f} alone. Run with a token budget of "
            "1, which takes one choice at a time"
        )
    return len(chosen)


def _exact(model: nn.Module) -> bool:
    return next(unwrapped(model).parameters()).dtype == torch.float32


def _who(adapter: str | None) -> str:
    return "the base" if adapter is None else f"adapter {adapter!r}"


def _spread(rows: Sequence[tuple[str | None, int]], count: int) -> list[int]:
    """Places of rows (adapter, length) of all lengths and adapters: evenly spaced in the order of lengths, adapters in turn."""
    by_adapter: dict[str | None, list[int]] = {}
    for place in sorted(range(len(rows)), key=lambda place: rows[place][1]):
        by_adapter.setdefault(rows[place][0], []).append(place)
    each = max(2, count // max(1, len(by_adapter)))
    return [
        one[round(place * (len(one) - 1) / max(1, min(each, len(one)) - 1))]
        for one in by_adapter.values()
        for place in range(min(each, len(one)))
    ]


def _is_tie(model: nn.Module, request: Request, first: tuple[int | None, ...], second: tuple[int | None, ...]) -> bool:
    """Whether the two answers part at a token that is as likely as the other."""
    at = next(index for index, pair in enumerate(zip(first, second, strict=False)) if pair[0] != pair[1])
    rows = rows_of(model, [request], at + 1)
    with evaluating(model):
        logits = rows.forward()
        for token in second[:at]:
            logits = rows.forward(torch.tensor([token], device=rows.device))
    logits = logits[0].float()
    both = [max(request.stop_ids, key=lambda stop: logits[stop]) if t is None else t for t in (first[at], second[at])]
    return bool((logits[both[0]] - logits[both[1]]).abs() <= TIE * (1 + logits.abs().max()))

"""The next token of each row of a batch whose rows have settings of their own, and log-probabilities.

Legend: B rows, S rows that sample, V vocabulary, L columns.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from graft.generation.sampling import PromptScores, Sampling, Top
from graft.routing.seeded import other_stream


def choose(logits_BV: Tensor, settings: Sequence[Sampling], generators: Sequence[torch.Generator]) -> Tensor:
    """Return the next token of each row [B]. A row draws from its own generator alone, so company changes nothing."""
    tokens_B = logits_BV.argmax(-1)
    rows = [row for row, each in enumerate(settings) if each.temperature > 0]
    if not rows:
        return tokens_B
    chosen = [settings[row] for row in rows]
    scores_SV = at_least_float32(logits_BV[rows])
    column = lambda values: scores_SV.new_tensor(values)[:, None]  # noqa: E731
    scores_SV = scores_SV / column([each.temperature for each in chosen])
    for place, each in enumerate(chosen):
        if 0 < each.top_k < scores_SV.shape[1]:
            kept = scores_SV[place].topk(each.top_k)
            scores_SV[place] = torch.full_like(scores_SV[place], float("-inf")).scatter(0, kept.indices, kept.values)
    probs_SV = torch.softmax(scores_SV, -1)
    for place, each in enumerate(chosen):
        probs_V = nucleus(probs_SV[place], each.top_p)
        tokens_B[rows[place]] = torch.multinomial(probs_V, 1, generator=generators[rows[place]])[0]
    return tokens_B


def top_of(logprobs_V: Tensor, count: int) -> Top:
    """Return the likeliest tokens with their log-probabilities, likeliest first."""
    found = logprobs_V.topk(min(count, len(logprobs_V)))
    return tuple(zip(found.indices.tolist(), found.values.tolist(), strict=True))


def prompt_scores(logits_LV: Tensor, ids: Sequence[int], settings: Sampling) -> PromptScores:
    """Score a prompt as its request asks. logits_LV: at each of its tokens."""
    logprobs_LV = at_least_float32(logits_LV[:-1]).log_softmax(-1)
    targets_L1 = torch.tensor(ids[1:], dtype=torch.long, device=logits_LV.device)[:, None]
    found = logprobs_LV.gather(1, targets_L1)[:, 0].tolist()
    top = settings.top_prompt_logprobs
    tops = (None, *(top_of(each, top) for each in logprobs_LV)) if top else ()
    named = tuple(_scores_of(*pair) for pair in zip(logprobs_LV, settings.prompt_targets, strict=False))
    return PromptScores((None, *found), tops, named, _draws(logprobs_LV, settings))


def _scores_of(logprobs_V: Tensor, tokens: Sequence[int]) -> tuple[float, ...]:
    found = logprobs_V[torch.tensor(tokens, dtype=torch.long, device=logprobs_V.device).clamp(min=0)].tolist()
    return tuple(0.0 if token < 0 else score for token, score in zip(tokens, found, strict=True))


def _draws(logprobs_LV: Tensor, settings: Sampling) -> tuple[Top, ...]:
    """Draw tokens at each place, from a generator that no sample draws from."""
    count = settings.prompt_draws
    if not count or not len(logprobs_LV):
        return ()
    if settings.temperature:
        generator = other_stream(settings.seed, 0, logprobs_LV.device)
        probs_LV = torch.softmax(logprobs_LV / settings.temperature, -1)
        tokens_LK = torch.multinomial(probs_LV, count, replacement=True, generator=generator)
    else:
        tokens_LK = logprobs_LV.argmax(-1, keepdim=True).expand(-1, count)
    pairs = zip(tokens_LK.tolist(), logprobs_LV.gather(1, tokens_LK).tolist(), strict=True)
    return tuple(tuple(zip(tokens, scores, strict=True)) for tokens, scores in pairs)


def at_least_float32(x: Tensor) -> Tensor:
    """Return x in float32, or as it is if it is wider."""
    return x if x.dtype == torch.float64 else x.float()


def nucleus(probs_BV: Tensor, top_p: float) -> Tensor:
    """Keep the likeliest tokens whose probabilities together reach `top_p` (at least one) and set the others to 0.

    The result is not normalised. With top_p = 0.7, [0.2, 0.5, 0.3] becomes [0, 0.5, 0.3].
    """
    if top_p >= 1:
        return probs_BV
    sorted_BV, order_BV = probs_BV.sort(-1, descending=True)
    before_BV = sorted_BV.cumsum(-1) - sorted_BV  # probability of all likelier tokens
    return torch.zeros_like(probs_BV).scatter(-1, order_BV, sorted_BV.masked_fill(before_BV >= top_p, 0.0))

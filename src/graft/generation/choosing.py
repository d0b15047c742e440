"""The next token of each row of a batch whose rows have settings of their own, and log-probabilities.

Legend: B rows, S rows that sample, V vocabulary, L columns.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from graft.generation.generate import nucleus
from graft.generation.sampling import PromptScores, Sampling, Top


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


def prompt_scores(logits_LV: Tensor, ids: Sequence[int], top: int) -> PromptScores:
    """Score a prompt. logits_LV: at each of its tokens."""
    logprobs_LV = at_least_float32(logits_LV[:-1]).log_softmax(-1)
    targets_L1 = torch.tensor(ids[1:], dtype=torch.long, device=logits_LV.device)[:, None]
    found = logprobs_LV.gather(1, targets_L1)[:, 0].tolist()
    tops = (None, *(top_of(each, top) for each in logprobs_LV)) if top else ()
    return PromptScores((None, *found), tops)


def at_least_float32(x: Tensor) -> Tensor:
    """Return x in float32, or as it is if it is wider."""
    return x if x.dtype == torch.float64 else x.float()

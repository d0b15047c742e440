"""Generation for many prompts at once: left padded, with mask and positions, a cache, and finished rows taken out.

The base runs once on all rows of a batch, each row's adapter on that row alone (`rows`). Under greedy decoding in float32 the
answers are those of one prompt at a time (`selfcheck` proves it); `beams` searches.

Legend: B rows still running, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from graft.generation.batching import evaluating
from graft.generation.beams import beam_search
from graft.generation.requests import Decoding, Generated, Request, limits, plan
from graft.generation.rows import CacheKind, check_cache
from graft.generation.seq2seq_rows import rows_of


def generate(
    model: nn.Module,
    requests: Sequence[Request],
    decoding: Decoding | None = None,
    *,
    token_budget: int = 8192,
    cache: CacheKind = "dynamic",
) -> Iterator[tuple[int, Generated]]:
    """Answer all requests; yields (number of the request, answer) as batches finish, in no particular order.

    token_budget: tokens of a batch at most, prompts and room for answers together. cache: see `rows`.
    Raises `GraftError` for a prompt of no tokens, for an adapter that is not attached, and for a cache that the model cannot have.
    """
    decoding = decoding or Decoding()
    check_cache(model, cache)
    limit = limits(model, requests, decoding)
    for number in (number for number in range(len(requests)) if not limit[number]):
        yield number, Generated((), "no_room")
    for batch in plan(requests, limit, decoding, token_budget):
        chosen, allowed = [requests[number] for number in batch], [limit[number] for number in batch]
        with evaluating(model):
            if decoding.beams > 1:
                answers = beam_search(model, chosen, allowed, decoding, cache)
            else:
                answers = _collected(model, chosen, allowed, decoding, cache)
        yield from zip(batch, answers, strict=True)


def stream(model: nn.Module, request: Request, decoding: Decoding | None = None) -> Iterator[int]:
    """Answer one request token by token. The stop token is not among them; nothing comes where there is no room."""
    decoding = decoding or Decoding()
    (limit,) = limits(model, [request], decoding)
    if not limit:
        return
    with evaluating(model):
        for _, token in _steps(model, [request], [limit], decoding):
            if token in request.stop_ids:
                return
            yield token


def _collected(
    model: nn.Module, requests: Sequence[Request], limit: Sequence[int], decoding: Decoding, cache: CacheKind
) -> list[Generated]:
    ids: list[list[int]] = [[] for _ in requests]
    stopped = [False] * len(requests)
    for row, token in _steps(model, requests, limit, decoding, cache):
        if token in requests[row].stop_ids:
            stopped[row] = True
        else:
            ids[row].append(token)
    return [Generated(tuple(i), "stopped" if s else "truncated") for i, s in zip(ids, stopped, strict=True)]


def _steps(
    model: nn.Module,
    requests: Sequence[Request],
    limit: Sequence[int],
    decoding: Decoding,
    cache: CacheKind = "dynamic",
) -> Iterator[tuple[int, int]]:
    """(row, token) of every running row, step by step. A row ends with its stop token or its limit."""
    rows = rows_of(model, requests, max(limit), cache)
    pick = _Pick(decoding, len(requests), rows.device)
    running_rows = list(range(len(requests)))
    tokens_B, done = None, 0
    while running_rows:
        tokens_B = pick(rows.forward(tokens_B), running_rows)
        done += 1
        chosen = tokens_B.tolist()
        yield from zip(running_rows, chosen, strict=True)
        left = [
            index
            for index, (row, token) in enumerate(zip(running_rows, chosen, strict=True))
            if token not in requests[row].stop_ids and done < limit[row]
        ]
        if len(left) < len(running_rows):
            running_rows = [running_rows[index] for index in left]
            if running_rows:
                index_B = torch.tensor(left, device=rows.device)
                rows.select(index_B)
                tokens_B = tokens_B[index_B]


class _Pick:
    """Choose the next token of each row."""

    def __init__(self, decoding: Decoding, num_rows: int, device: torch.device) -> None:
        self.decoding = decoding
        self.generators = [torch.Generator(device).manual_seed(decoding.seed) for _ in range(num_rows)]

    def __call__(self, logits_BV: Tensor, rows: Sequence[int]) -> Tensor:
        """[B] tokens; `rows` are the numbers of the requests."""
        if not self.decoding.temperature:
            return logits_BV.argmax(-1)
        probs_BV = torch.softmax(logits_BV.float() / self.decoding.temperature, -1)
        probs_BV = nucleus(probs_BV, self.decoding.top_p)
        drawn = [
            torch.multinomial(probs_V, 1, generator=self.generators[row])
            for probs_V, row in zip(probs_BV, rows, strict=True)
        ]
        return torch.cat(drawn)


def nucleus(probs_BV: Tensor, top_p: float) -> Tensor:
    """Zero but for the likeliest tokens whose probability together reaches `top_p` (at least one). Not normalised."""
    if top_p >= 1:
        return probs_BV
    sorted_BV, order_BV = probs_BV.sort(-1, descending=True)
    before_BV = sorted_BV.cumsum(-1) - sorted_BV
    return torch.zeros_like(probs_BV).scatter(-1, order_BV, sorted_BV.masked_fill(before_BV >= top_p, 0.0))

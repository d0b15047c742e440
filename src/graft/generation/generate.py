"""Generate answers to many prompts at once: prompts are padded on the left, and finished rows leave the batch.

The base runs once on all rows of a batch and each adapter on its own rows (`causal`, `seq2seq`). In float32, greedy answers
equal those of one prompt at a time, which `selfcheck` verifies. `beams` holds the beam search.

Legend: B rows still running, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from graft.distributed.group import ALONE, Group
from graft.generation.beams import beam_search
from graft.generation.causal import CacheKind, check_cache
from graft.generation.requests import Decoding, Generated, Request, apart, limits, plan
from graft.generation.seq2seq import start_batch
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
    """Answer all requests. Yields (number of the request, its answer) as batches finish, in no particular order.

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
    for batch in group.turns(plan(requests, limit, decoding, token_budget, apart(model, requests, limit))):
        chosen, allowed = [requests[number] for number in batch], [limit[number] for number in batch]
        with evaluation_mode(model):
            if decoding.beams > 1:
                answers = beam_search(model, chosen, allowed, decoding, cache)
            else:
                answers = _collected(model, chosen, allowed, decoding, cache)
        yield from zip(batch, answers, strict=True)


def stream(model: nn.Module, request: Request, decoding: Decoding | None = None) -> Iterator[int]:
    """Answer one request token by token, without the stop token. Yields nothing if the prompt fills the context."""
    decoding = decoding or Decoding()
    (limit,) = limits(model, [request], decoding)
    if not limit:
        return
    with evaluation_mode(model):
        for _, token in _steps(model, [request], [limit], decoding):
            if token in request.stop_ids:
                return
            yield token


def _collected(
    model: nn.Module, requests: Sequence[Request], limit: Sequence[int], decoding: Decoding, cache: CacheKind
) -> list[Generated]:
    """Run one batch to its end and collect the answer of each row."""
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
    """Yield (row, token) for every running row, step by step. A row ends with its stop token or at its limit."""
    batch = start_batch(model, requests, max(limit), cache)
    choose = _TokenChooser(decoding, len(requests), batch.device)
    running_rows = list(range(len(requests)))
    tokens_B, num_new = None, 0
    while running_rows:
        tokens_B = choose(batch.forward(tokens_B), running_rows)
        num_new += 1
        chosen = tokens_B.tolist()
        yield from zip(running_rows, chosen, strict=True)
        # Take finished rows out of the batch. `running_rows` keeps the original number of each row that is left:
        # if row 1 of [0, 1, 2] ends, left is [0, 2], and from then on row 1 of the batch is the original row 2.
        left = [
            index
            for index, (row, token) in enumerate(zip(running_rows, chosen, strict=True))
            if token not in requests[row].stop_ids and num_new < limit[row]
        ]
        if len(left) < len(running_rows):
            running_rows = [running_rows[index] for index in left]
            if running_rows:
                index_B = torch.tensor(left, device=batch.device)
                batch.select(index_B)
                tokens_B = tokens_B[index_B]


class _TokenChooser:
    """Chooses the next token of each row, greedily or by sampling."""

    def __init__(self, decoding: Decoding, num_rows: int, device: torch.device) -> None:
        self.decoding = decoding
        self.generators = [torch.Generator(device).manual_seed(decoding.seed) for _ in range(num_rows)]

    def __call__(self, logits_BV: Tensor, rows: Sequence[int]) -> Tensor:
        """Return the next tokens [B]. rows: the original number of each row, which selects its random generator."""
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
    """Keep the likeliest tokens whose probabilities together reach `top_p` (at least one) and set the others to 0.

    The result is not normalised. With top_p = 0.7, [0.2, 0.5, 0.3] becomes [0, 0.5, 0.3].
    """
    if top_p >= 1:
        return probs_BV
    sorted_BV, order_BV = probs_BV.sort(-1, descending=True)
    before_BV = sorted_BV.cumsum(-1) - sorted_BV  # probability of all likelier tokens
    return torch.zeros_like(probs_BV).scatter(-1, order_BV, sorted_BV.masked_fill(before_BV >= top_p, 0.0))

"""Beam search over one batch in which each row has its own limit of new tokens and its own stop tokens.

Each row is searched as transformers' `generate(num_beams=K)` searches it with its defaults:

- The search of a row keeps its K likeliest unfinished texts.
- A text that ends while it is among the K likeliest becomes an answer. Its score is its mean log-likelihood per token.
- The search of a row ends when its best unfinished text scores below all of its K answers, or when the row reaches its limit
  of new tokens. At the limit the unfinished texts become answers too.

A row whose search has ended leaves the batch, so rows with different limits can share a batch.

Legend: B rows still searched, K beams, C candidates, V vocabulary, T most new tokens of any row, S most stop tokens of any row.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from graft.generation.causal import CacheKind
from graft.generation.requests import Decoding, Generated, Request
from graft.generation.seq2seq import start_batch

NEVER = float("-inf")


def beam_search(
    model: nn.Module,
    requests: Sequence[Request],
    limit: Sequence[int],
    decoding: Decoding,
    cache: CacheKind = "dynamic",
) -> list[Generated]:
    """Return the best text of each request. limit: most new tokens of each request, at least 1."""
    batch, num_beams = start_batch(model, requests, max(limit), cache), decoding.beams
    found: list[Generated] = [Generated((), "truncated")] * len(requests)
    with torch.no_grad():
        search = _Search.start(requests, limit, num_beams, batch.device)
        # Read each prompt once, then repeat its row (and its cache) for the K beams: rows become [B * K].
        logits_BKV = batch.forward()[:, None].expand(-1, num_beams, -1)
        batch.select(torch.arange(len(requests), device=batch.device).repeat_interleave(num_beams))
        while True:
            beam_BK, done_B = search.step(logits_BKV)
            for row in done_B.nonzero()[:, 0].tolist():
                number = int(search.number_B[row])
                found[number] = _answer(search.best(row), requests[number].stop_ids)
            left_B = ~done_B
            if not left_B.any():
                return found
            # Beam k of row b is row b * K + k of the batch. With K = 2, if both new texts of row 1 continue its beam 0,
            # rows 2 and 2 are selected.
            start_B1 = torch.arange(len(done_B), device=batch.device)[:, None] * num_beams
            batch.select((start_B1 + beam_BK)[left_B].flatten())
            search = search.only(left_B)
            logits_BKV = batch.forward(search.last_BK.flatten()).unflatten(0, (-1, num_beams))


@dataclass
class _Search:
    """The state of the search of B rows after `num_new` new tokens."""

    number_B: Tensor
    """Number of the request that a row answers."""
    limit_B: Tensor
    """Most new tokens of a row."""
    stop_BS: Tensor
    """Stop tokens of a row, filled up with -1."""
    text_BKT: Tensor
    """Unfinished texts, likeliest first."""
    score_BK: Tensor
    """Log-likelihoods of the unfinished texts."""
    answer_BKT: Tensor
    """The best answers so far, best first."""
    length_BK: Tensor
    """Tokens of each answer."""
    mean_BK: Tensor
    """Mean log-likelihoods of the answers; `NEVER` in places that no answer has taken yet."""
    num_new: int = 0

    @staticmethod
    def start(requests: Sequence[Request], limit: Sequence[int], num_beams: int, device: torch.device) -> _Search:
        """Return the search before the first token."""
        num_rows, most = len(requests), max(len(request.stop_ids) for request in requests)
        stop = [sorted(request.stop_ids) + [-1] * (most - len(request.stop_ids)) for request in requests]
        text_BKT = torch.zeros(num_rows, num_beams, max(limit), dtype=torch.long, device=device)
        score_BK = torch.full((num_rows, num_beams), NEVER, device=device)
        score_BK[:, 0] = 0.0  # all beams are still the same prompt, so only the first may be continued
        return _Search(
            number_B=torch.arange(num_rows, device=device),
            limit_B=torch.tensor(limit, device=device),
            stop_BS=torch.tensor(stop, dtype=torch.long, device=device).view(num_rows, most),
            text_BKT=text_BKT,
            score_BK=score_BK,
            answer_BKT=text_BKT.clone(),
            length_BK=torch.zeros_like(score_BK, dtype=torch.long),
            mean_BK=torch.full_like(score_BK, NEVER),
        )

    @property
    def last_BK(self) -> Tensor:
        """The newest token of each unfinished text."""
        return self.text_BKT[:, :, self.num_new - 1]

    def step(self, logits_BKV: Tensor) -> tuple[Tensor, Tensor]:
        """Lengthen every text by one token.

        Returns the beam that each new text continues [B, K], and whether the search of each row has ended [B].
        """
        num_beams, vocabulary = logits_BKV.shape[1:]
        total_BKV = torch.log_softmax(logits_BKV.float(), -1) + self.score_BK[..., None]
        # Each beam can end with each of its S stop tokens, so (1 + S) * K candidates always hold K texts that go on.
        # transformers takes at least 2 * K.
        candidates = min(max(2, 1 + self.stop_BS.shape[1]) * num_beams, num_beams * vocabulary)
        score_BC, index_BC = total_BKV.flatten(1).topk(candidates)
        beam_BC, token_BC = index_BC // vocabulary, index_BC % vocabulary
        text_BCT = _pick(self.text_BKT, beam_BC)
        text_BCT[:, :, self.num_new] = token_BC
        self.num_new += 1
        ends_BC = (token_BC[..., None] == self.stop_BS[:, None]).any(-1) | (self.num_new >= self.limit_B)[:, None]
        # Only a text among the K likeliest may become an answer; the others that end here are dropped.
        self._add_answers(text_BCT[:, :num_beams], score_BC[:, :num_beams], ends_BC[:, :num_beams])
        self.score_BK, place_BK = score_BC.masked_fill(ends_BC, NEVER).topk(num_beams)
        self.text_BKT = _pick(text_BCT, place_BK)
        can_improve_B = self.score_BK[:, 0] / self.num_new > self.mean_BK.amin(1)
        return beam_BC.gather(1, place_BK), ~can_improve_B | (self.num_new >= self.limit_B)

    def _add_answers(self, text_BKT: Tensor, score_BK: Tensor, ends_BK: Tensor) -> None:
        """Add those of the texts that end here to the answers, and keep the K best answers."""
        mean_BK = (score_BK / self.num_new).masked_fill(~ends_BK, NEVER)
        self.mean_BK, place_BK = torch.cat([self.mean_BK, mean_BK], 1).topk(score_BK.shape[1])
        self.answer_BKT = _pick(torch.cat([self.answer_BKT, text_BKT], 1), place_BK)
        lengths = torch.cat([self.length_BK, torch.full_like(self.length_BK, self.num_new)], 1)
        self.length_BK = lengths.gather(1, place_BK)

    def best(self, row: int) -> list[int]:
        """Return the best answer of a row, with the token that ended it."""
        return self.answer_BKT[row, 0, : self.length_BK[row, 0]].tolist()

    def only(self, left_B: Tensor) -> _Search:
        """Return the search of the rows where left_B is true."""
        if left_B.all():
            return self
        kept = {name: value[left_B] for name, value in vars(self).items() if isinstance(value, Tensor)}
        return _Search(**kept, num_new=self.num_new)


def _pick(text_BKT: Tensor, place_BC: Tensor) -> Tensor:
    """Gather the texts at the given places of each row: [B, C, T]."""
    return text_BKT.gather(1, place_BC[..., None].expand(-1, -1, text_BKT.shape[2]))


def _answer(ids: list[int], stop_ids: frozenset[int]) -> Generated:
    """Wrap an answer, without the stop token that may end it."""
    ended = ids[-1] in stop_ids
    return Generated(tuple(ids[:-1] if ended else ids), "stopped" if ended else "truncated")

"""Beam search for the rows of one batch, each with its own limit of new tokens and its own stop tokens.

The search is that of transformers' `generate(num_beams=K)` with its defaults, row by row: of each row the K likeliest unfinished
texts go on; a text that ends while it is among the K likeliest is an answer, scored by its mean log-likelihood; the search of
a row is over when its best unfinished text scores below all of K answers, or when the row's limit is met, where unfinished
texts count as answers too. A row whose search is over leaves the batch, so rows of unequal room share one.

Legend: B rows still searched, K beams, C candidates, V vocabulary, T most new tokens of any row, S most stop tokens of any row.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from graft.generation.requests import Decoding, Generated, Request
from graft.generation.rows import CacheKind
from graft.generation.seq2seq_rows import rows_of

NEVER = float("-inf")


def beam_search(
    model: nn.Module,
    requests: Sequence[Request],
    limit: Sequence[int],
    decoding: Decoding,
    cache: CacheKind = "dynamic",
) -> list[Generated]:
    """The best text of each request. limit: most new tokens of each, at least 1."""
    rows, num_beams = rows_of(model, requests, max(limit), cache), decoding.beams
    found: list[Generated] = [Generated((), "truncated")] * len(requests)
    with torch.no_grad():
        search = _Search.start(requests, limit, num_beams, rows.device)
        logits_BKV = rows.forward()[:, None].expand(-1, num_beams, -1)
        rows.select(torch.arange(len(requests), device=rows.device).repeat_interleave(num_beams))
        while True:
            beam_BK, over_B = search.step(logits_BKV)
            for place in over_B.nonzero()[:, 0].tolist():
                number = int(search.number_B[place])
                found[number] = _answer(search.best(place), requests[number].stop_ids)
            left_B = ~over_B
            if not left_B.any():
                return found
            start_B1 = torch.arange(len(over_B), device=rows.device)[:, None] * num_beams
            rows.select((start_B1 + beam_BK)[left_B].flatten())
            search = search.only(left_B)
            logits_BKV = rows.forward(search.last_BK.flatten()).unflatten(0, (-1, num_beams))


@dataclass
class _Search:
    """Where the search of some rows stands after `made` tokens."""

    number_B: Tensor
    """Which request a row is."""
    limit_B: Tensor
    stop_BS: Tensor
    """Filled up with -1."""
    text_BKT: Tensor
    """Unfinished texts, likeliest first."""
    score_BK: Tensor
    """Their log-likelihoods."""
    answer_BKT: Tensor
    """The best answers so far, best first."""
    length_BK: Tensor
    mean_BK: Tensor
    """Their mean log-likelihoods; `NEVER` where there are fewer than K."""
    made: int = 0

    @staticmethod
    def start(requests: Sequence[Request], limit: Sequence[int], num_beams: int, device: torch.device) -> _Search:
        num_rows, most = len(requests), max(len(request.stop_ids) for request in requests)
        stop = [sorted(request.stop_ids) + [-1] * (most - len(request.stop_ids)) for request in requests]
        text_BKT = torch.zeros(num_rows, num_beams, max(limit), dtype=torch.long, device=device)
        score_BK = torch.full((num_rows, num_beams), NEVER, device=device)
        score_BK[:, 0] = 0.0  # all beams are the prompt: only one may be continued
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
        return self.text_BKT[:, :, self.made - 1]

    def step(self, logits_BKV: Tensor) -> tuple[Tensor, Tensor]:
        """Lengthen the texts by a token: (which beam each text continues [B, K], whether the row's search is over [B])."""
        num_beams, vocabulary = logits_BKV.shape[1:]
        total_BKV = torch.log_softmax(logits_BKV.float(), -1) + self.score_BK[..., None]
        # So many that K are left when every beam's stop tokens are among them.
        candidates = min(max(2, 1 + self.stop_BS.shape[1]) * num_beams, num_beams * vocabulary)
        score_BC, index_BC = total_BKV.flatten(1).topk(candidates)
        beam_BC, token_BC = index_BC // vocabulary, index_BC % vocabulary
        text_BCT = _pick(self.text_BKT, beam_BC)
        text_BCT[:, :, self.made] = token_BC
        self.made += 1
        ends_BC = (token_BC[..., None] == self.stop_BS[:, None]).any(-1) | (self.made >= self.limit_B)[:, None]
        self._add(text_BCT[:, :num_beams], score_BC[:, :num_beams], ends_BC[:, :num_beams])
        self.score_BK, place_BK = score_BC.masked_fill(ends_BC, NEVER).topk(num_beams)
        self.text_BKT = _pick(text_BCT, place_BK)
        can_improve_B = self.score_BK[:, 0] / self.made > self.mean_BK.amin(1)
        return beam_BC.gather(1, place_BK), ~can_improve_B | (self.made >= self.limit_B)

    def _add(self, text_BKT: Tensor, score_BK: Tensor, ends_BK: Tensor) -> None:
        """Keep the K best of the answers and of those of these texts that end here."""
        mean_BK = (score_BK / self.made).masked_fill(~ends_BK, NEVER)
        self.mean_BK, place_BK = torch.cat([self.mean_BK, mean_BK], 1).topk(score_BK.shape[1])
        self.answer_BKT = _pick(torch.cat([self.answer_BKT, text_BKT], 1), place_BK)
        lengths = torch.cat([self.length_BK, torch.full_like(self.length_BK, self.made)], 1)
        self.length_BK = lengths.gather(1, place_BK)

    def best(self, place: int) -> list[int]:
        """The best answer of a row, with the token that ended it."""
        return self.answer_BKT[place, 0, : self.length_BK[place, 0]].tolist()

    def only(self, left_B: Tensor) -> _Search:
        """The search of some rows."""
        if left_B.all():
            return self
        kept = {name: value[left_B] for name, value in vars(self).items() if isinstance(value, Tensor)}
        return _Search(**kept, made=self.made)


def _pick(text_BKT: Tensor, place_BC: Tensor) -> Tensor:
    """[B, C, T]: those texts."""
    return text_BKT.gather(1, place_BC[..., None].expand(-1, -1, text_BKT.shape[2]))


def _answer(ids: list[int], stop_ids: frozenset[int]) -> Generated:
    ended = ids[-1] in stop_ids
    return Generated(tuple(ids[:-1] if ended else ids), "stopped" if ended else "truncated")

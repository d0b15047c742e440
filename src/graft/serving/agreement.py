"""How far log-probabilities at sampling are from those of the trainer's own pass, on a few tokens: one number that a server shows."""

from __future__ import annotations

import torch

from graft.generation.loaded import LoadedModel
from graft.generation.requests import Request
from graft.generation.running import RunningBatch
from graft.generation.sampling import Sampling
from graft.training.forward.scoring import Scorer

CANDIDATES, TOKENS = 4, 8


def agreement(loaded: LoadedModel) -> float:
    """Return the largest difference in nats, over a few sampled tokens of the base and of the first adapters."""
    batch = RunningBatch(loaded.base.model, rows=CANDIDATES)
    ids = tuple(loaded.base.tokenizer.encode("one two three", add_special_tokens=False))
    settings = Sampling(TOKENS, seed=0, logprobs=True)
    samples = [batch.add(Request(ids, each.adapter), settings)[0] for each in loaded.candidates[:CANDIDATES]]
    while not batch.idle:
        batch.step()
    sequences = [((*ids, *each.ids), len(ids)) for each in samples]
    scored = Scorer(loaded.base.model).logprobs(sequences, [each.request.adapter for each in samples])
    apart = [
        torch.tensor(each.logprobs, dtype=torch.float64) - torch.tensor(own, dtype=torch.float64)
        for each, own in zip(samples, scored, strict=True)
    ]
    return float(torch.cat(apart).abs().max())

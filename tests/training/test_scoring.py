"""Sampled log-probabilities against the trainer's own pass over the same tokens."""

from __future__ import annotations

import pytest
import torch

import graft
from graft.generation.requests import Request
from graft.generation.running import RunningBatch
from graft.generation.sampling import Sampling
from graft.training.forward.scoring import Scorer
from tests.small import small_model
from tests.test_every_kind import specs


@pytest.mark.parametrize("dtype, bound", [("float32", 1e-5), pytest.param("float64", 1e-12, marks=pytest.mark.slow)])
def test_a_sampler_and_a_trainer_give_every_kind_the_same_log_probabilities(dtype: str, bound: float) -> None:
    model = small_model(scale=4.0).to(getattr(torch, dtype))
    tried, apart = [], {}
    for number, spec in enumerate(each for each in specs() if "sites" not in each):
        try:
            graft.attach(model, {"a": spec})
        except graft.GraftError:
            continue  # tests/test_every_kind.py says which kinds a base refuses, and why
        torch.manual_seed(number)
        with torch.no_grad():
            for _, parameter in graft.parameters(model, "a"):
                parameter.add_(torch.randn_like(parameter), alpha=0.2)
        batch = RunningBatch(model)
        settings = Sampling(4, seed=number, logprobs=True)
        asked = [
            (Request((7, 40, 12, 3, 88, 90, 21), "a"), settings),
            (Request((60, 61), "a"), settings),
        ]
        samples = []
        for request, settings in asked:  # each joins the batch when the one before has a token
            samples += batch.add(request, settings)
            batch.step()
        while not batch.idle:
            batch.step()
        sequences = [((*each.request.ids, *each.ids), len(each.request.ids)) for each in samples]
        scored = Scorer(model).logprobs(sequences, [each.request.adapter for each in samples])
        sampled = torch.tensor([each.logprobs for each in samples], dtype=torch.float64)
        apart[str(spec)] = float((sampled - torch.tensor(scored, dtype=torch.float64)).abs().max())
        tried.append(spec["kind"])
        graft.detach(model, "a")
    assert len(set(tried)) > 25
    assert {name: found for name, found in apart.items() if not found <= bound} == {}


def test_a_base_without_adapters_is_scored_as_its_own_forward_does() -> None:
    model, ids = small_model(), torch.tensor([[5, 9, 200, 31, 8]])
    with torch.no_grad():
        logprobs = model(ids).logits[0].log_softmax(-1)
    expected = logprobs[:-1].gather(1, ids[0, 1:, None])[:, 0]
    (found,) = Scorer(model).logprobs([(ids[0].tolist(), 1)], [None])
    torch.testing.assert_close(torch.tensor(found), expected, atol=1e-4, rtol=0)

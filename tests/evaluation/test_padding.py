"""Padding changes nothing: 64 prompts of mixed length, one at a time and thirty-two at a time, answer the same tokens."""

from __future__ import annotations

import pytest
import torch

import graft
from graft.evaluation.generation import generate
from graft.evaluation.requests import Decoding, Request
from tests.small import small_model

KINDS = {
    "lora": {"kind": "lora", "rank": 4, "sites": "linear"},
    "series": {"kind": "series", "bottleneck": 8, "sites": "attn mlp"},
    "parallel": {"kind": "parallel", "bottleneck": 8, "sites": "mlp"},
    "prefix": {"kind": "prefix", "tokens": 5},
}
NEW, LONGEST = 6, 60


@pytest.mark.parametrize("family", ["llama", "bloom", "gptj"])
@pytest.mark.parametrize("kind", KINDS)
def test_sixty_four_prompts_alone_and_in_batches_of_thirty_two(family: str, kind: str) -> None:
    model = small_model(family)
    graft.attach(model, {kind: KINDS[kind]})
    draw = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for _, parameter in graft.parameters(model, kind):
            parameter.copy_(torch.randn(parameter.shape, generator=draw) * (2.0 if kind == "prefix" else 0.3))
    lengths = torch.randint(1, LONGEST + 1, (64,), generator=draw).tolist()
    prompts = [tuple(torch.randint(2, 258, (length,), generator=draw).tolist()) for length in lengths]
    requests = [Request(prompt, kind, frozenset({1})) for prompt in prompts]
    alone = dict(generate(model, requests, Decoding(NEW), token_budget=1))
    batched = dict(generate(model, requests, Decoding(NEW), token_budget=32 * (max(lengths) + NEW)))
    assert {number: answer.ids for number, answer in batched.items()} == {n: answer.ids for n, answer in alone.items()}
    assert alone == batched
    bare = dict(generate(model, [Request(prompt) for prompt in prompts[:8]], Decoding(NEW), token_budget=10**6))
    assert any(bare[number].ids != alone[number].ids for number in bare), "the adapter changes what is answered"

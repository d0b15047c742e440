"""Generation in batches against transformers' own, one prompt at a time, for every family."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import graft
from graft.errors import GraftError
from graft.generation.generate import generate
from graft.generation.requests import Decoding, Request
from tests.families.zoo import OTHERS, TABLE, tiny

KINDS: dict[str, Any] = {
    "lora": {"kind": "lora", "rank": 4, "sites": "linear"},
    "series": {"kind": "series", "bottleneck": 8, "sites": "attn"},
    "prefix": {"kind": "prefix", "tokens": 5},
}


@pytest.mark.slow
@pytest.mark.parametrize("family", [*TABLE, *OTHERS])
def test_a_mixed_batch_answers_as_each_prompt_alone_greedily_and_with_beams(family: str) -> None:
    model = tiny(family)
    for name, config in KINDS.items():
        try:
            graft.attach(model, {name: config})
        except GraftError:
            assert family in OTHERS, "every family of the table takes every kind"
    torch.manual_seed(1)
    with torch.no_grad():
        for name in graft.names(model):
            for _, parameter in graft.parameters(model, name):
                parameter.normal_(std=2.0 if name == "prefix" else 0.3)
    draw = torch.Generator().manual_seed(2)
    prompts = [tuple(torch.randint(2, 64, (length,), generator=draw).tolist()) for length in (3, 17, 8, 1, 30)]
    requests = [Request(prompt, adapter) for adapter in (None, *graft.names(model)) for prompt in prompts]
    for beams, tokens in ((1, 8), (3, 5)):
        answers = dict(generate(model, requests, Decoding(tokens, beams), token_budget=10**6))
        for number, request in enumerate(requests):
            assert answers[number].ids == alone(model, request, beams, tokens), (beams, request.adapter)


def alone(model: Any, request: Request, beams: int, tokens: int) -> tuple[int, ...]:
    ids = torch.tensor([request.ids])
    options = {
        "num_beams": beams,
        "max_new_tokens": tokens,
        "do_sample": False,
        "eos_token_id": None,
        "pad_token_id": 0,
    }
    with torch.no_grad(), graft.use(model, request.adapter):
        out = model.generate(ids, attention_mask=torch.ones_like(ids), **options)
    return tuple(out[0, len(request.ids) :].tolist())

"""Beam search over rows with limits and stop tokens of their own, against transformers' search of each prompt alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import graft
from graft.generation.generate import generate
from graft.generation.requests import Decoding, Generated, Request, limits, plan
from tests.small import small_model

CONTEXT, NEW = 48, 20
LENGTHS = [3, 17, 30, 1, 40, 44, 47, 48]
KINDS: dict[str, Any] = {
    "lora": {"kind": "lora", "rank": 4, "sites": "attn.q attn.v mlp.down"},
    "moved": {"kind": "prefix", "tokens": 3, "positions": "after_prefix"},
}


@pytest.fixture(scope="module", params=["llama", "gpt2", "bloom"])
def model(request: pytest.FixtureRequest) -> Any:
    """gpt2 has learned positions: a row that went on behind its room would fall off their end."""
    base = graft.attach(small_model(request.param, **({} if request.param == "bloom" else {"context": CONTEXT})), KINDS)
    torch.manual_seed(1)
    with torch.no_grad():
        for name in KINDS:
            for _, parameter in graft.parameters(base, name):
                parameter.normal_(std=0.5)
    return base


def asked(stop: tuple[frozenset[int], ...] = (frozenset(),)) -> list[Request]:
    draw = torch.Generator().manual_seed(2)
    ids = [tuple(torch.randint(2, 258, (length,), generator=draw).tolist()) for length in LENGTHS]
    return [
        Request(one, adapter, stop[number % len(stop)]) for adapter in (None, *KINDS) for number, one in enumerate(ids)
    ]


def alone(model: Any, request: Request, limit: int, beams: int) -> Generated:
    """The reference: one prompt in transformers' own search, with as many new tokens as it has room for."""
    ids = torch.tensor([request.ids])
    with torch.no_grad(), graft.use(model, request.adapter):
        out = model.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=False, num_beams=beams, max_new_tokens=limit,
            eos_token_id=sorted(request.stop_ids) or None, pad_token_id=0,
        )  # fmt: skip
    new = out[0, len(request.ids) :].tolist()
    end = next((place for place, token in enumerate(new) if token in request.stop_ids), None)
    return Generated(tuple(new), "truncated") if end is None else Generated(tuple(new[:end]), "stopped")


def test_rows_of_unequal_room_share_a_batch_and_end_where_each_alone_ends(model: Any) -> None:
    requests, decoding = asked(), Decoding(NEW, beams=4)
    room = limits(model, requests, decoding)
    assert (len({one for one in room if one}) > 4) is (model.config.model_type != "bloom")
    assert len(plan(requests, room, decoding, 10**6)) == 1
    answers = dict(generate(model, requests, decoding, token_budget=10**6))
    for number, request in enumerate(requests):
        if room[number]:
            assert answers[number] == alone(model, request, room[number], 4)
            assert len(answers[number].ids) == room[number]
        else:
            assert answers[number].reason == "no_room"


def test_rows_stop_at_their_own_tokens_whatever_ends_their_neighbours(model: Any) -> None:
    free = dict(generate(model, asked(), Decoding(NEW, beams=3), token_budget=10**6))
    seen = [one.ids[4] for one in free.values() if len(one.ids) > 4]
    stop = (frozenset(seen[:2]), frozenset(), frozenset(seen[2:7]), frozenset(seen[4:5]))
    requests, decoding = asked(stop), Decoding(NEW, beams=3)
    room = limits(model, requests, decoding)
    answers = dict(generate(model, requests, decoding, token_budget=10**6))
    for number, request in enumerate(requests):
        if room[number]:
            assert answers[number] == alone(model, request, room[number], 3)
    assert {answer.reason for answer in answers.values()} >= {"stopped", "truncated"}


def test_the_budget_changes_batches_and_not_answers(model: Any) -> None:
    requests, decoding = asked((frozenset({5, 9, 33}),)), Decoding(NEW, beams=2)
    together = dict(generate(model, requests, decoding, token_budget=10**6))
    assert together == dict(generate(model, requests, decoding, token_budget=1))


def test_the_prompts_go_through_the_base_once_and_not_once_per_beam() -> None:
    model = small_model("llama")
    sizes: list[tuple[int, int]] = []
    hook = model.register_forward_pre_hook(
        lambda _, __, given: sizes.append(tuple(given["input_ids"].shape)), with_kwargs=True
    )
    requests = [Request((5,) * length) for length in (3, 7)]
    list(generate(model, requests, Decoding(3, beams=4)))
    hook.remove()
    assert sizes == [(2, 7), (8, 1), (8, 1)]

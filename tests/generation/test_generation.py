"""Batches of unequal prompts and many adapters against transformers' own generate, one prompt at a time."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import graft
from graft.bases.context import context_length
from graft.errors import GraftError
from graft.generation.choosing import nucleus
from graft.generation.generate import generate, stream
from graft.generation.requests import Decoding, Request, plan
from graft.generation.selfcheck import self_check
from tests.small import small_model

FAMILIES = ["llama", "gpt2", "bloom", "gptj"]
KINDS: dict[str, Any] = {
    "lora": {"kind": "lora", "rank": 4, "sites": "attn.q attn.v mlp.down"},
    "series": {"kind": "series", "bottleneck": 8},
    "parallel": {"kind": "parallel", "bottleneck": 8},
    "prefix": {"kind": "prefix", "tokens": 5},
    "moved": {"kind": "prefix", "tokens": 3, "positions": "after_prefix"},
}
LENGTHS = [3, 17, 8, 1, 30]


@pytest.fixture(scope="module", params=FAMILIES)
def model(request: pytest.FixtureRequest) -> Any:
    """A base with one strong random adapter of every kind."""
    base = graft.attach(small_model(request.param), KINDS)
    torch.manual_seed(1)
    with torch.no_grad():
        for name in KINDS:
            for _, parameter in graft.parameters(base, name):
                parameter.normal_(std=2.0 if KINDS[name]["kind"] == "prefix" else 0.5)
    return base


def prompts(adapters: list[str | None], stop: tuple[int, ...] = ()) -> list[Request]:
    draw = torch.Generator().manual_seed(2)
    ids = [tuple(torch.randint(2, 258, (length,), generator=draw).tolist()) for length in LENGTHS]
    return [Request(one, adapter, frozenset(stop)) for adapter in adapters for one in ids]


def by_transformers(model: Any, request: Request, **options: Any) -> tuple[int, ...]:
    """The reference: one prompt, no padding, transformers' loop."""
    ids = torch.tensor([request.ids])
    stop = {"eos_token_id": sorted(request.stop_ids) or None, "pad_token_id": 0}
    with torch.no_grad(), graft.use(model, request.adapter):
        out = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, **stop, **options)
    new = out[0, len(request.ids) :].tolist()
    end = next((place for place, token in enumerate(new) if token in request.stop_ids), len(new))
    return tuple(new[:end])


def test_all_kinds_and_the_base_in_one_batch_answer_as_each_prompt_alone(model: Any) -> None:
    requests = prompts([None, *KINDS])
    answers = dict(generate(model, requests, Decoding(max_new_tokens=8), token_budget=10**6))
    assert [answers[n].ids for n in range(len(requests))] == [
        by_transformers(model, request, max_new_tokens=8) for request in requests
    ]
    found = [answers[n].ids for n in range(len(requests))]
    by_adapter = {tuple(found[start : start + len(LENGTHS)]) for start in range(0, len(found), len(LENGTHS))}
    assert len(by_adapter) == 1 + len(KINDS), "the adapters must differ for this test to say something"


def test_a_row_that_ends_leaves_the_others_as_they_are(model: Any) -> None:
    free = prompts([None, "lora", "prefix"])
    unstopped = dict(generate(model, free, Decoding(max_new_tokens=8)))
    stop = unstopped[1].ids[2], unstopped[7].ids[4]
    requests = prompts([None, "lora", "prefix"], stop)
    answers = dict(generate(model, requests, Decoding(max_new_tokens=8)))
    for number, request in enumerate(requests):
        expected = by_transformers(model, request, max_new_tokens=8)
        assert answers[number].ids == expected
        assert answers[number].reason == ("stopped" if len(expected) < 8 else "truncated")
    assert {answer.reason for answer in answers.values()} == {"stopped", "truncated"}


def test_beam_search_over_a_mixed_batch_answers_as_each_prompt_alone(model: Any) -> None:
    requests = prompts([None, "lora", "series", "prefix", "moved"], stop=(5,))[::2]
    answers = dict(generate(model, requests, Decoding(max_new_tokens=6, beams=4)))
    for number, request in enumerate(requests):
        assert answers[number].ids == by_transformers(model, request, max_new_tokens=6, num_beams=4)


def test_streaming_gives_the_tokens_of_the_batch_without_the_stop_token(model: Any) -> None:
    (request,) = prompts(["parallel"])[1:2]
    expected = dict(generate(model, [request], Decoding(max_new_tokens=8)))[0].ids
    assert tuple(stream(model, request, Decoding(max_new_tokens=8))) == expected
    stopping = Request(request.ids, "parallel", frozenset({expected[3]}))
    assert tuple(stream(model, stopping, Decoding(max_new_tokens=8))) == expected[: expected.index(expected[3])]


def test_the_budget_changes_batches_and_not_answers(model: Any) -> None:
    requests = prompts([None, "series"])
    decoding = Decoding(max_new_tokens=5)
    assert dict(generate(model, requests, decoding, token_budget=1)) == dict(generate(model, requests, decoding))


def test_the_self_check_passes_where_batches_are_right(model: Any) -> None:
    assert self_check(model, prompts([None, *KINDS], stop=(1,))) == 12


def test_the_self_check_fails_where_rows_of_a_batch_see_each_other() -> None:
    model = small_model("llama")
    norm = model.model.norm
    forward = norm.forward
    norm.forward = lambda hidden: forward(hidden) + hidden.mean(0, keepdim=True) * (hidden.shape[0] > 1)
    with pytest.raises(GraftError, match="batched generation is wrong for this model"):
        self_check(model, prompts([None]))


def test_the_self_check_does_not_judge_low_precision() -> None:
    assert self_check(small_model("llama").bfloat16(), prompts([None])) == 0


def test_a_prompt_that_fills_the_context_comes_back_as_no_room_and_is_never_cut() -> None:
    model = small_model("gpt2", context=20)
    requests = [Request((5,) * length) for length in (18, 20, 4, 25)]
    answers = dict(generate(model, requests, Decoding(max_new_tokens=6)))
    assert [answers[n].reason for n in range(4)] == ["truncated", "no_room", "truncated", "no_room"]
    assert [len(answers[n].ids) for n in range(4)] == [2, 0, 6, 0]


def test_a_prefix_that_takes_positions_shortens_the_context_and_one_that_does_not_leaves_it() -> None:
    model = small_model("gpt2", context=20)
    graft.attach(model, {"zero": KINDS["prefix"], "moved": KINDS["moved"]})
    assert [context_length(model, name) for name in (None, "zero", "moved")] == [20, 20, 17]
    answers = dict(generate(model, [Request((5,) * 16, "moved")], Decoding(max_new_tokens=6)))
    assert len(answers[0].ids) == 1


def test_the_settings_that_a_base_brings_along_do_not_change_the_answers() -> None:
    model = small_model("llama")
    requests = prompts([None])
    decodings = [Decoding(max_new_tokens=6), Decoding(max_new_tokens=6, beams=3)]
    before = [dict(generate(model, requests, decoding)) for decoding in decodings]
    model.generation_config.update(repetition_penalty=5.0, do_sample=True, temperature=3.0, length_penalty=9.0)
    assert [dict(generate(model, requests, decoding)) for decoding in decodings] == before
    assert model.generation_config.repetition_penalty == 5.0


def test_sampling_depends_on_the_seed_and_not_on_the_company() -> None:
    model = small_model("llama", scale=1.0)
    requests = prompts([None])
    draws = [
        dict(generate(model, requests, Decoding(8, temperature=1.0, seed=seed), token_budget=budget))
        for seed, budget in ((3, 1), (3, 10**6), (4, 10**6))
    ]
    assert draws[0] == draws[1] != draws[2]


def test_the_nucleus_keeps_the_likeliest_tokens_that_reach_the_mass() -> None:
    probs = torch.tensor([[0.1, 0.5, 0.15, 0.25], [0.97, 0.01, 0.01, 0.01]])
    assert torch.equal(nucleus(probs, 0.7), torch.tensor([[0.0, 0.5, 0.0, 0.25], [0.97, 0.0, 0.0, 0.0]]))


def test_batches_hold_the_budget_and_every_request_once() -> None:
    requests = [Request((1,) * (1 + 7 * n % 40)) for n in range(50)]
    batches = plan(requests, [10] * 50, Decoding(), 200)
    assert sorted(n for batch in batches for n in batch) == list(range(50))
    for batch in batches:
        assert len(batch) * (max(len(requests[n].ids) for n in batch) + 10) <= 200 or len(batch) == 1


def test_the_mode_of_the_model_comes_back() -> None:
    model = small_model("gpt2").train()
    list(generate(model, prompts([None]), Decoding(max_new_tokens=2)))
    assert all(module.training for module in model.modules())


def test_wrong_decoding_and_empty_prompts_are_refused() -> None:
    with pytest.raises(GraftError, match="beam search does not sample"):
        Decoding(beams=2, temperature=0.5)
    with pytest.raises(GraftError, match="max_new_tokens must be at least 1"):
        Decoding(max_new_tokens=0)
    with pytest.raises(GraftError, match="a prompt of no tokens"):
        list(generate(small_model(), [Request(())]))


def test_few_requests_share_a_batch_and_many_are_kept_apart_by_adapter() -> None:
    few = [Request((1,) * 10, name) for _ in range(4) for name in (None, "a", "b")]
    assert len(plan(few, [10] * 12, Decoding(), 8192)) == 1
    many = [Request((1,) * 10, name) for _ in range(400) for name in (None, "a", "b")]
    batches = plan(many, [10] * 1200, Decoding(), 2000)
    assert sum(len({many[n].adapter for n in batch}) == 1 for batch in batches) >= len(batches) - 2
    for batch in batches:
        names = [many[n].adapter for n in batch]
        assert names == sorted(names, key=lambda name: (name is not None, name or "")), (
            "rows of an adapter are neighbours"
        )

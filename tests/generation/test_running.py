"""A running batch that rows join and leave, against transformers' own loop and against each request alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import MistralConfig, MistralForCausalLM

import graft
from graft.errors import GraftError
from graft.generation.generate import generate
from graft.generation.requests import Decoding, Request
from graft.generation.running import RunningBatch
from graft.generation.sampling import Sample, Sampling
from graft.generation.text_stream import TextStream
from tests.generation.test_generation import KINDS, by_transformers, prompts
from tests.small import small_model, small_tokenizer

GREEDY = Sampling(max_tokens=8, temperature=0.0)


@pytest.fixture(scope="module", params=["llama", "bloom"])
def model(request: pytest.FixtureRequest) -> Any:
    base = graft.attach(small_model(request.param), {**KINDS, "prompt": {"kind": "prompt", "tokens": 3}})
    torch.manual_seed(1)
    with torch.no_grad():
        for name in (*KINDS, "prompt"):
            for _, parameter in graft.parameters(base, name):
                parameter.normal_(std=2.0 if name in ("prefix", "moved") else 0.5)
    return base


def run(batch: RunningBatch, asked: list[tuple[Request, Sampling]], apart: int = 2) -> list[Sample]:
    """Ask one request every `apart` steps, and run to the end."""
    found: list[Sample] = []
    for request, sampling in asked:
        found += batch.add(request, sampling)
        for _ in range(apart):
            batch.step()
    while not batch.idle:
        batch.step()
    return found


def test_rows_that_join_and_leave_answer_as_transformers_answers_each_alone(model: Any) -> None:
    requests = prompts([None, *KINDS, "prompt"], stop=(7, 9, 30))[::2]
    found = run(RunningBatch(model, rows=5), [(each, GREEDY) for each in requests], apart=1)
    for request, sample in zip(requests, found, strict=True):
        expected = by_transformers(model, request, max_new_tokens=8)
        assert tuple(sample.answer_ids) == expected
        assert sample.end == ("stop" if len(expected) < 8 else "length")


def test_sampled_rows_draw_what_each_draws_alone_and_samples_of_one_prompt_differ(model: Any) -> None:
    settings = Sampling(max_tokens=6, temperature=3.0, top_p=0.9, seed=5, n=3)
    requests = prompts([None, "lora", "prefix"])[::3]
    found = run(RunningBatch(model, rows=9), [(each, settings) for each in requests])
    for number, sample in enumerate(found):
        alone = Decoding(6, temperature=3.0, top_p=0.9, seed=5 + number % 3)
        assert tuple(sample.ids) == dict(generate(model, [requests[number // 3]], alone))[0].ids
    assert len({tuple(sample.ids) for sample in found[:3]}) == 3


def test_a_sliding_window_hides_the_same_tokens_after_a_join() -> None:
    config = MistralConfig(vocab_size=258, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
                           num_key_value_heads=2, sliding_window=8)  # fmt: skip
    torch.manual_seed(0)
    model = MistralForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(8.0 if parameter.dim() > 1 else 1.0)
    graft.attach(model, {"a": {"kind": "lora", "sites": "attn.q"}})
    requests = prompts([None])
    found = run(RunningBatch(model, rows=4), [(each, GREEDY) for each in requests], apart=3)
    assert [tuple(each.ids) for each in found] == [by_transformers(model, each, max_new_tokens=8) for each in requests]


def test_log_probabilities_are_those_of_the_whole_sequence_in_one_pass(model: Any) -> None:
    settings = Sampling(max_tokens=6, temperature=1.5, seed=1, logprobs=True, top_logprobs=3, prompt_logprobs=True)
    requests = [Request(each.ids, each.adapter) for each in prompts([None, *KINDS, "prompt"])[1::5]]
    batch = RunningBatch(model, rows=4, prefixes=100)
    for sample in run(batch, [(each, settings) for each in requests]):
        ids = [*sample.request.ids, *sample.ids]
        with torch.no_grad(), graft.use(model, sample.request.adapter):
            logits = model(input_ids=torch.tensor([ids[:-1]]), use_cache=False).logits[0]
        whole = logits.log_softmax(-1)
        expected = whole.gather(1, torch.tensor(ids[1:])[:, None])[:, 0]
        assert sample.prompt is not None and sample.prompt.logprobs[0] is None
        scores = torch.tensor([*sample.prompt.logprobs[1:], *sample.logprobs])
        torch.testing.assert_close(scores, expected, atol=3e-5 * float(logits.abs().max()), rtol=0)
        for top, row in zip(sample.top, whole[len(sample.request.ids) - 1 :], strict=True):
            assert [token for token, _ in top] == row.topk(3).indices.tolist()


def test_a_prompt_that_was_read_is_not_read_again_until_its_adapter_changes() -> None:
    model = graft.attach(small_model(), {"a": {"kind": "lora", "sites": "attn.q"}})
    batch, request = RunningBatch(model, prefixes=20), Request((5, 6, 7, 8), "a")
    first, second = run(batch, [(request, GREEDY), (request, GREEDY)])
    assert (first.cached, second.cached, first.ids) == (False, True, second.ids)
    assert not run(batch, [(Request(request.ids, None), GREEDY)])[0].cached
    with torch.no_grad():
        next(parameter for _, parameter in graft.parameters(model, "a")).add_(0.5)
    assert not run(batch, [(request, GREEDY)])[0].cached
    run(batch, [(Request(tuple(range(5, 5 + length)), None), GREEDY) for length in (9, 10, 25)])
    assert batch.reader.prefixes.held == 19


def test_an_adapter_is_known_by_what_it_is_not_by_its_name(tmp_path: Path) -> None:
    model = graft.attach(small_model(), {"a": {"kind": "lora", "sites": "attn.q"}})
    with torch.no_grad():
        for _, parameter in graft.parameters(model, "a"):
            parameter.normal_()
    graft.save(model, "a", tmp_path / "a")
    graft.load(model, tmp_path / "a", name="b")
    batch, ids = RunningBatch(model, prefixes=20), (5, 6, 7, 8)
    assert batch.reader.digests.of("a") == batch.reader.digests.of("b") != batch.reader.digests.of(None)
    (first,) = run(batch, [(Request(ids, "a"), GREEDY)])
    graft.detach(model, "a")
    (second,) = run(batch, [(Request(ids, "b"), GREEDY)])
    assert second.cached and first.ids == second.ids
    graft.detach(model, "b")
    graft.attach(model, {"b": {"kind": "lora", "sites": "attn.q"}})  # another one under the same name
    assert not run(batch, [(Request(ids, "b"), GREEDY)])[0].cached


def test_top_k_keeps_k_tokens() -> None:
    model = graft.attach(small_model(scale=1.0), {"a": {"kind": "lora", "sites": "attn.q"}})
    one = run(RunningBatch(model), [(Request((5, 6)), Sampling(4, temperature=9.0, top_k=1, seed=3))])[0]
    assert tuple(one.ids) == by_transformers(model, Request((5, 6)), max_new_tokens=4)
    first = [each.ids[0] for each in run(RunningBatch(model), [(Request((5, 6)), Sampling(1, 9.0, top_k=2, n=40))])]
    with torch.no_grad():
        assert set(first) == set(model(torch.tensor([[5, 6]])).logits[0, -1].topk(2).indices.tolist())


def test_a_dropped_row_and_one_that_is_not_finite_leave_the_others_alone(model: Any) -> None:
    requests = prompts([None, "lora"])[:8]
    alone = [by_transformers(model, each, max_new_tokens=8) for each in requests]
    batch = RunningBatch(model, rows=6)
    found = [batch.add(each, GREEDY)[0] for each in requests]
    batch.step()
    assert batch._logits_BV is not None
    batch._logits_BV[batch.samples.index(found[1])] = float("nan")
    batch.drop([found[2], found[7]])
    while not batch.idle:
        batch.step()
    assert [each.end for each in found] == ["length", "failed", "dropped", *["length"] * 4, "dropped"]
    assert found[1].problem == "the model's output is not finite"
    for number in (0, 3, 4, 5, 6):
        assert tuple(found[number].ids) == alone[number][: len(found[number].ids)] and len(found[number].ids) == 8


def test_stop_texts_end_an_answer_across_the_borders_of_tokens() -> None:
    tokenizer = small_tokenizer()
    text = TextStream(tokenizer, ["##!", "né"])
    pieces = []
    for token in tokenizer.encode("a # ## b # né!", add_special_tokens=False):
        if text.add(token):
            break
        pieces.append(text.take())
    assert text.stopped and text.text == "a # ## b # " == "".join([*pieces, text.take(ended=True)])
    assert "##" not in pieces[3] and all(not "a # ## b # né".startswith(each) or each in ("", "a") for each in pieces)


def test_wrong_settings_and_requests_that_do_not_fit_are_named() -> None:
    model = small_model("gpt2", context=20)
    batch = RunningBatch(model, rows=4)
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"top_p": 0.0}, "top_p"), ({"temperature": -1.0}, "temperature"), ({"n": 0}, "n must"),
        ({"stop": ("",)}, "a stop text"), ({"top_logprobs": 1000}, "top_logprobs"), ({"seed": 2**63}, "seed"),
    ]  # fmt: skip
    for settings, said in wrong:
        with pytest.raises(GraftError, match=said):
            Sampling(**settings)
    with pytest.raises(GraftError, match="n is 9, but a batch has at most 4 rows"):
        batch.add(Request((5,)), Sampling(n=9))
    with pytest.raises(GraftError, match="a prompt of no tokens"):
        batch.add(Request(()), GREEDY)
    lengths = {18: "length", 20: "no_room", 25: "no_room"}
    found = [batch.add(Request((5,) * length), GREEDY)[0] for length in lengths]
    scored = batch.add(Request((5,) * 20), Sampling(0, prompt_logprobs=True))[0]
    while not batch.idle:
        batch.step()
    assert [each.end for each in found] == list(lengths.values()) and len(found[0].ids) == 2
    assert (
        scored.end == "length" and scored.ids == [] and scored.prompt is not None and len(scored.prompt.logprobs) == 20
    )

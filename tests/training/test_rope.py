"""LongRoPE and dynamic NTK turn a whole pass by its longest row, and chunked attention shows in long rows only: no loss depends on that."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import transformers

import graft
from graft.attention import functions
from graft.data.datasets import TokenDataset
from graft.data.samples import Example
from graft.generation.generate import generate
from graft.generation.loss import sample_losses
from graft.generation.requests import Decoding, Request
from graft.routing.context import ForwardContext
from graft.training.forward.causal import Forward
from graft.training.forward.layout import decide, laid_out
from graft.training.validation import validation_scores
from tests.training.conftest import GATED, attach, batcher, examples, job_on, pairs

ORIGINAL = 16
SIZES = {**GATED, "max_position_embeddings": 16, "initializer_range": 0.3}
ROPE = {
    "longrope": {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 4, "long_factor": [4.0] * 4,
                 "original_max_position_embeddings": ORIGINAL},
    "dynamic": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0},
}  # fmt: skip


def model_with(rope: str) -> Any:
    torch.manual_seed(0)
    if rope == "chunked":
        sizes = {
            **SIZES,
            "intermediate_size_mlp": 48,
            "head_dim": 8,
            "num_local_experts": 2,
            "attention_chunk_size": ORIGINAL,
        }
        return transformers.Llama4ForCausalLM(transformers.Llama4TextConfig(**sizes)).eval()
    if rope == "longrope":
        sizes = {**SIZES, "max_position_embeddings": 64, "original_max_position_embeddings": ORIGINAL}
        return transformers.Phi3ForCausalLM(transformers.Phi3Config(**sizes, rope_parameters=ROPE[rope])).eval()
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES, rope_parameters=ROPE[rope])).eval()


def mixed() -> list[Example]:
    """Rows of both sides of the original length, and of several lengths beyond it."""
    return [*examples(2, 1, 8), *(each for each in examples(40, 2, 40) if len(each) > ORIGINAL)][:6]


@torch.no_grad()
def alone(rope: str, row: Example, adapter: Any = None) -> float:
    """The summed loss of one sample by transformers, in a model that has seen no other."""
    model = attach(model_with(rope), adapter=adapter)
    ids = torch.as_tensor(row.input_ids).long()[None]
    logs = model(input_ids=ids, use_cache=False).logits[0, :-1].double().log_softmax(-1)
    chosen = -logs.gather(-1, ids[0, 1:, None])[:, 0]
    return float(chosen[torch.as_tensor(row.supervised[1:])].sum())


@pytest.mark.parametrize("adapter", [None, {"kind": "prefix", "tokens": 3}], ids=["lora", "prefix"])
@pytest.mark.parametrize("layout", ["flat", "padded"])
@pytest.mark.parametrize("rope", ["longrope", "dynamic", "chunked"])
def test_losses_depend_neither_on_company_nor_on_the_budget(rope: str, layout: Any, adapter: Any) -> None:
    rows = mixed()
    wanted = [alone(rope, row, adapter) for row in rows]
    model = attach(model_with(rope), adapter=adapter)
    job = job_on(model, train=TokenDataset.of(rows), validation=TokenDataset.of(rows), batch_size=len(rows))
    forward = Forward(model)
    assert decide(forward, [job], "auto", batcher()).layout == "flat"
    found = []
    for budget in (4096, 50):
        own: dict[int, float] = {}
        for micro in batcher(layout, budget).cut(job.rows()):
            with laid_out(model, layout), torch.no_grad():
                losses = forward.losses(*batcher(layout).inputs(micro, forward.device))
            sums = losses.split([row.targets for row in micro])
            own |= {row.sample: float(each.sum()) for row, each in zip(micro, sums, strict=True)}
        found.append([own[number] for number in range(len(rows))])
    for each in (*found, sample_losses(model, rows, ["a"] * len(rows))):
        np.testing.assert_allclose(each, wanted, rtol=2e-5)
    counted = sum(row.num_targets for row in rows)
    scores = validation_scores(forward, job, batcher())
    assert scores["validation_loss"] == pytest.approx(sum(wanted) / counted, rel=2e-5)


@pytest.mark.parametrize("rope", ["longrope", "dynamic"])
def test_a_pair_on_both_sides_of_the_original_length_is_two_passes(rope: str) -> None:
    train = pairs(6, longest=30)
    model = attach(model_with(rope))
    job = job_on(model, train=train, objective={"kind": "dpo"})
    forward = Forward(model)
    rows = job.rows()
    with torch.no_grad():
        together = forward.losses(*batcher().inputs(rows, forward.device)).split([row.targets for row in rows])
    for row, losses in zip(rows, together, strict=True):
        with torch.no_grad():
            one = forward.losses(*batcher().inputs([row], forward.device))
        torch.testing.assert_close(losses, one, rtol=2e-5, atol=1e-5)


@pytest.mark.parametrize("rope", ["longrope", "dynamic"])
@pytest.mark.parametrize("beams", [1, 2])
def test_answers_depend_neither_on_company_nor_on_what_ran_before(rope: str, beams: int) -> None:
    prompts = [tuple(range(3, 3 + length)) for length in (4, 30, 12, 16, 20)]
    model = attach(model_with(rope))
    requests = [Request(ids, "a") for ids in prompts]
    decoding = Decoding(max_new_tokens=8, beams=beams)
    sizes = {"max_position_embeddings": 64}
    for config in (model.config, model.model.config):
        config.__dict__.update(sizes)
    together = dict(generate(model, requests, decoding))
    for number, request in enumerate(requests):
        fresh = attach(model_with(rope))
        fresh.config.__dict__.update(sizes)
        ((_, one),) = generate(fresh, [request], decoding)
        assert one.ids == together[number].ids
        if beams == 1 and rope == "longrope":  # greedily, without a cache: what the model says of each whole text
            text = list(request.ids)
            for token in one.ids:
                with torch.no_grad(), graft.use(fresh, "a"):
                    logits = fresh(input_ids=torch.tensor([text]), use_cache=False).logits[0, -1]
                assert float(logits.max() - logits[token]) < 1e-4
                text.append(token)


@pytest.mark.parametrize("rope", ["longrope", "dynamic"])
def test_virtual_tokens_in_the_embedding_are_refused_where_rows_have_other_frequencies(rope: str) -> None:
    model = attach(model_with(rope), adapter={"kind": "prompt", "tokens": 3})
    ids = torch.arange(3, 3 + ORIGINAL)[None]
    model(input_ids=ids[:, : ORIGINAL - 3])
    with pytest.raises(graft.GraftError, match=f"more than {ORIGINAL - 3} tokens; this one has {ORIGINAL}"):
        model(input_ids=ids)
    graft.detach(model)
    assert not [key for module in model.modules() for key in module.__dict__ if key.startswith("graft")]


def test_a_chunk_that_the_flat_layout_does_not_keep_is_found_by_the_longest_row(monkeypatch: Any) -> None:
    rows = TokenDataset.of([*examples(30, 1, 8), *(each for each in examples(9, 2, 40) if len(each) > 30)])
    model = attach(model_with("chunked"))
    job = job_on(model, train=rows, batch_size=4)
    assert decide(Forward(model), [job], "auto", batcher()).layout == "flat"
    monkeypatch.setattr(functions, "_chunk_of", lambda module: None)
    decision = decide(Forward(model), [job], "auto", batcher())
    assert decision.layout == "padded" and "differ by" in str(decision.reason)


def test_models_without_such_frequencies_run_a_batch_in_one_pass() -> None:
    model = attach(transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES)).eval())
    calls: list[int] = []
    model.model.register_forward_pre_hook(lambda *_: calls.append(1))
    job = job_on(model, train=TokenDataset.of(mixed()), batch_size=4)
    batch, context = batcher().inputs(job.rows(), torch.device("cpu"))
    assert isinstance(context, ForwardContext)
    Forward(model).losses(batch, context)
    assert len(calls) == 1

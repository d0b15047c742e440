"""Token-flat equals padded, in every family that runs flat; the others run padded and say so."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from graft.errors import GraftError
from graft.ops.cross_entropy import LogitTransform
from graft.training.forward.causal import Forward
from graft.training.forward.layout import decide, laid_out
from graft.training.forward.modes import set_training
from tests.training.conftest import CONFIGS, assert_same_gradient, attach, batcher, data, gradients, job_on, tiny

FLAT = [family for family in CONFIGS if family != "mpt"]
TAILS = {
    "gemma2": LogitTransform(cap=30.0),
    "cohere": LogitTransform(scale=0.25),
    "granite": LogitTransform(scale=0.25),
}


def run(forward: Forward, job: Any, layout: Any, budget: int) -> tuple[float, torch.Tensor]:
    """Mean loss of a step, and its gradient."""
    rows = job.rows()
    job.optimizer.zero_grad()
    total = 0.0
    batches = batcher(layout, budget)
    for micro in batches.cut(rows):
        with laid_out(forward.model, layout):
            loss = 0.1 * forward.losses(*batches.inputs(micro, forward.device)).sum()
            loss.backward()
        total += float(loss.detach())
    return total, gradients(job)


@pytest.mark.parametrize("adapter", ["lora", "prefix"])
@pytest.mark.parametrize("family", FLAT)
def test_flat_equals_padded_in_loss_and_gradient(family: str, adapter: str) -> None:
    config = (
        {"kind": "lora", "rank": 4, "sites": "linear", "dropout": 0.3}
        if adapter == "lora"
        else {"kind": "prefix", "tokens": 3}
    )
    model = attach(tiny(family), adapter=config)
    job = job_on(model)
    forward = Forward(model)
    decision = decide(forward, [job], "auto", batcher())
    assert (decision.layout, decision.reason) == ("flat", None)
    assert (forward.head_mode, forward.logit_transform) == ("chunks", TAILS.get(family, LogitTransform()))
    set_training(model, ["a"])
    flat, flat_gradient = run(forward, job, "flat", 40)
    padded, padded_gradient = run(forward, job, "padded", 10_000)
    assert flat == pytest.approx(padded, rel=1e-5)
    assert_same_gradient(flat_gradient, padded_gradient)


@pytest.mark.parametrize("family", ["llama", "gemma2", "cohere", "gptj", "opt", "mpt"])
def test_loss_equals_the_models_own(family: str) -> None:
    """transformers' own loss, with labels, is the second implementation."""
    model = attach(tiny(family))
    job = job_on(model)
    forward = Forward(model)
    layout = decide(forward, [job], "auto", batcher()).layout
    for row in job.rows()[:3]:
        ids = torch.as_tensor(row.example.input_ids).long()[None]
        labels = torch.where(torch.as_tensor(row.example.supervised)[None], ids, -100)
        with torch.no_grad():
            wanted = float(model(input_ids=ids, labels=labels, use_cache=False).loss)
            with laid_out(model, layout):
                each = forward.losses(*batcher(layout).inputs([row], forward.device))
        assert float(each.mean()) == pytest.approx(wanted, rel=1e-5)


@pytest.mark.parametrize("way", ["kept", "whole"])
@pytest.mark.parametrize("layout", ["flat", "padded"])
def test_every_way_through_the_head_gives_the_same(way: Any, layout: Any) -> None:
    model = attach(tiny("gemma2"))
    job, forward = job_on(model), Forward(model)
    decide(forward, [job], "auto", batcher())
    wanted, gradient = run(forward, job, layout, 50)
    forward.head_mode = way
    total, other = run(forward, job, layout, 50)
    assert total == pytest.approx(wanted, rel=1e-6)
    assert_same_gradient(other, gradient)


def test_logits_that_the_config_does_not_explain_are_left_to_the_models_own_forward() -> None:
    model = attach(tiny())
    type_ = type(model)

    class Odd(type_):  # type: ignore[misc, valid-type]
        def forward(self, input_ids=None, attention_mask=None, position_ids=None, use_cache=None, logits_to_keep=0):  # type: ignore[no-untyped-def]
            output = super().forward(
                input_ids, attention_mask, position_ids, use_cache=use_cache, logits_to_keep=logits_to_keep
            )
            output.logits = output.logits * 1.5
            return output

    model.__class__ = Odd
    job, forward = job_on(model), Forward(model)
    assert decide(forward, [job], "auto", batcher()).layout == "flat" and forward.head_mode == "kept"
    flat, flat_gradient = run(forward, job, "flat", 60)
    padded, padded_gradient = run(forward, job, "padded", 60)
    assert flat == pytest.approx(padded, rel=1e-5)
    assert_same_gradient(flat_gradient, padded_gradient)


@pytest.mark.parametrize("way", ["chunks", "kept"])
def test_an_adapted_head_in_either_layout(way: Any) -> None:
    model = attach(tiny(), adapter={"kind": "lora", "rank": 2, "sites": "head attn.q"})
    job, forward = job_on(model), Forward(model)
    assert decide(forward, [job], "auto", batcher()).layout == "flat" and forward.head_mode == "chunks"
    forward.head_mode = way
    flat, flat_gradient = run(forward, job, "flat", 60)
    padded, padded_gradient = run(forward, job, "padded", 60)
    assert flat == pytest.approx(padded, rel=1e-5)
    assert_same_gradient(flat_gradient, padded_gradient)


def test_a_family_that_cannot_run_flat_runs_padded_with_a_reason() -> None:
    model = attach(tiny("mpt"))
    decision = decide(Forward(model), [job_on(model)], "auto", batcher())
    assert decision.layout == "padded" and "MptAttention" in str(decision.reason)


def test_flat_demanded_of_a_family_that_cannot_is_refused() -> None:
    model = attach(tiny("mpt"))
    with pytest.raises(GraftError, match="train.layout is flat.*MptAttention"):
        decide(Forward(model), [job_on(model)], "flat", batcher())


def test_a_model_that_mixes_sequences_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """Attention that ignores the segments: what transformers does by default."""
    model = attach(tiny())
    monkeypatch.setattr("graft.attention.functions._by_segments", _mixing)
    decision = decide(Forward(model), [job_on(model)], "auto", batcher())
    assert decision.layout == "padded" and "differ by" in str(decision.reason)


def test_one_sample_per_step_still_proves_that_sequences_do_not_mix(monkeypatch: pytest.MonkeyPatch) -> None:
    model = attach(tiny())
    job = job_on(model, batch_size=1, train=data(4))
    assert decide(Forward(model), [job], "auto", batcher()).layout == "flat"
    monkeypatch.setattr("graft.attention.functions._by_segments", _mixing)
    assert decide(Forward(model), [job], "auto", batcher()).layout == "padded"


def _mixing(module: Any, backend: str, function: Any, query: Any, key: Any, value: Any, *rest: Any) -> torch.Tensor:
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    return torch.nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True).transpose(1, 2)

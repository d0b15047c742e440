"""Points 7 and 14: several adapters on one base do not touch each other, a mixed batch equals each alone, and switching is no work."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import graft
from graft.testing.checks.many import alone
from tests.contract.table import ENDS, GROUPED, Row, base, check, ids, logits, loss, pristine, randomise, rows

KINDS: dict[str, Any] = {
    "lora": graft.LoRA(rank=3, sites="linear"),
    "fused": graft.LoRA(rank=2, sites="attn.q attn.v"),
    "series": graft.Series(bottleneck=4, init="bert", sites="attn mlp"),
    "before": graft.Series(bottleneck=4, position="before", init="bert", sites="mlp"),
    "parallel": graft.Parallel(bottleneck=4, init="bert", sites="attn mlp"),
    "layer": graft.Series(bottleneck=4, init="bert", sites="layer"),
    "prefix": graft.Prefix(tokens=3),
    "after": graft.Prefix(tokens=2, positions="after_prefix"),
    "prompt": graft.PromptTuning(tokens=3),
    "beside": graft.LLaMAAdapter(tokens=2),
    "mam": [graft.Prefix(tokens=2, projection=4), graft.Parallel(bottleneck=4)],
    "full": graft.Full(sites="mlp.down"),
}


def every_kind(family: str) -> nn.Module:
    """A base with one adapter of every kind and hook."""
    model = base(family)
    graft.attach(model, KINDS)
    for number, name in enumerate(KINDS):
        randomise(model, name, number)
    return model


@rows()
def test_training_one_adapter_leaves_the_other_bitwise_untouched(row: Row) -> None:
    check("training_leaves_others_untouched", row)


@rows()
def test_a_mixed_batch_equals_each_alone(row: Row) -> None:
    check("mixed_batch_equals_each_alone", row)


@pytest.mark.parametrize("family", ["llama", "bloom", "gptj", "gpt2", "gemma2"])
def test_all_kinds_share_one_batch(family: str) -> None:
    model = every_kind(family).double()
    order = (*KINDS, None, "parallel", "lora")
    inputs = ids(len(order), 6)
    with graft.route(model, order):
        mixed = logits(model, inputs)
    for number, name in enumerate(order):
        torch.testing.assert_close(mixed[number], alone(model, name, inputs)[number], atol=2e-5, rtol=0)


@rows(
    "llama-lora llama-parallel-mlp llama-prefix-projection bloom-mam gpt2-lora-fused llama-prompt bert-prompt llama-llama-adapter"
)
def test_the_gradients_of_a_mixed_batch_are_those_of_each_alone(row: Row) -> None:
    check("mixed_gradients_equal_each_alone", row)


def test_a_routing_that_first_served_inference_mode_serves_training_too() -> None:
    model, inputs = every_kind("llama"), ids(3)
    with graft.route(model, ["lora", "mam", "lora"]):
        with torch.inference_mode():
            model(inputs)
        loss(model, inputs).backward()
    assert all(p.grad is not None for _, p in graft.parameters(model, "lora"))


@pytest.mark.parametrize("family", ["llama", "bloom"])
def test_beams_follow_their_rows(family: str) -> None:
    model, order = every_kind(family), ("lora", None, "after", "parallel")
    inputs = ids(4, 5)
    settings = {
        "max_new_tokens": 4,
        "num_beams": 3,
        "do_sample": False,
        "min_new_tokens": 4,
        "attention_mask": torch.ones_like(inputs),
    }
    with graft.route(model, order):
        mixed = model.generate(inputs, **settings)
    for number, name in enumerate(order):
        with graft.use(model, name):
            own = model.generate(
                inputs[number : number + 1], **(settings | {"attention_mask": torch.ones(1, 5, dtype=torch.long)})
            )
        assert torch.equal(mixed[number], own[0])


@rows("llama-lora llama-mam llama-prefix-after bloom-prefix-projection")
def test_a_copy_and_a_new_name_are_the_same_adapter(row: Row) -> None:
    check("copy_and_rename", row)


def test_the_order_of_attaching_does_not_matter() -> None:
    one, other = base("llama"), base("llama")
    graft.attach(one, {"a": KINDS["mam"], "b": KINDS["lora"]})
    graft.attach(other, {"b": KINDS["lora"]})
    graft.attach(other, {"a": KINDS["mam"]})
    for number, name in enumerate("ab"):
        randomise(one, name, number)
        with torch.no_grad():
            for (_, p), (_, q) in zip(graft.parameters(other, name), graft.parameters(one, name), strict=True):
                p.copy_(q)
        assert torch.equal(alone(one, name, ids()), alone(other, name, ids()))


def calls_of(work: Callable[[], None]) -> int:
    """Python functions entered."""
    count = 0

    def profile(frame: Any, event: str, argument: Any) -> None:
        nonlocal count
        count += event == "call"

    sys.setprofile(profile)
    try:
        work()
    finally:
        sys.setprofile(None)
    return count


def test_switching_is_no_walk_over_the_model() -> None:
    counts = {}
    for layers in (1, 4):
        model = LlamaForCausalLM(LlamaConfig(**ENDS, **(GROUPED | {"num_hidden_layers": layers})))
        graft.attach(model, {"a": KINDS["lora"], "b": KINDS["mam"]})

        def switch(model: nn.Module = model) -> None:
            with graft.use(model, "a"), graft.use(model, None), graft.route(model, ["a", "b", None, "a"]):
                pass

        switch()
        counts[layers] = calls_of(switch)
    assert counts[1] == counts[4] < 200


def test_modules_without_a_part_in_the_pass_run_the_base_with_few_calls_more() -> None:
    model, inputs = every_kind("llama"), ids(1, 3)
    with graft.use(model, None), torch.no_grad():
        model(inputs)
        off = calls_of(lambda: model(inputs))
    with torch.no_grad():
        plain = calls_of(lambda: pristine("llama")(inputs))
    grafted = sum("graft" in module._modules for module in model.modules())
    assert off - plain < 20 * grafted

"""Points 9 and 12: greedy generation of a batch of unequal prompts equals one at a time, with every cache and with none."""

from __future__ import annotations

import pytest
import torch

import graft
from graft.testing.checks.generation import greedy, prompts
from tests.contract.table import Row, attached, check, ids, row_of, rows

FEW = (
    "llama-lora llama-series-houlsby llama-series-before-mlp llama-parallel-mlp llama-prefix llama-prefix-after llama-mam "
    "bloom-prefix bloom-prefix-after bloom-mam gptj-prefix-after gptj-parallel-attn gpt2-prefix-after gpt2-lora-fused "
    "qwen3-prefix gemma2-mam gemma2-prefix llama-prompt llama-prompt-stack bloom-prompt gptj-p-tuning gpt2-prompt gemma2-prompt-hidden "
    "llama-prefix-text llama-llama-adapter-stack gemma2-llama-adapter-stack"
)


@rows(FEW)
def test_a_batch_of_unequal_prompts_equals_one_at_a_time_with_every_cache_and_with_none(row: Row) -> None:
    check("unequal_prompts_equal_one_at_a_time", row)
    model = attached(row)
    _, batch, mask = prompts()
    on = greedy(model, batch, mask)
    with graft.use(model, None):
        assert not torch.equal(greedy(model, batch, mask), on)


@rows(
    "llama-mam bloom-prefix-projection gptj-adapterh gemma2-parallel-mlp llama-prompt bloom-prompt-stack gpt2-llama-adapter-peft"
)
def test_routed_prompts_generate_as_each_adapter_alone(row: Row) -> None:
    check("routed_prompts_equal_each_adapter_alone", row)


@rows(where=lambda row: row.causal)
def test_tokens_one_at_a_time_through_the_cache_give_the_logits_of_the_whole(row: Row) -> None:
    check("cache_gives_the_logits_of_the_whole", row)


def test_switching_between_two_generations_leaves_nothing_in_the_cache() -> None:
    model, inputs = attached(row_of("llama-prefix"), None, torch.float32, "a", "b"), ids(2, 5)
    first = greedy(model, inputs)
    with graft.use(model, "b"):
        assert not torch.equal(greedy(model, inputs), first)
    assert torch.equal(greedy(model, inputs), first)


def test_routing_of_another_size_than_the_prompts_is_an_error() -> None:
    model = attached(row_of("llama-prefix"))
    with (
        graft.route(model, ["a", None]),
        pytest.raises(graft.GraftError, match="the batch has 3 rows, but the routing names 2"),
    ):
        greedy(model, ids(3, 4))

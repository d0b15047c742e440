"""MiSS: PEFT's numbers in all three variants, shards that do not come out even, and settings that do not fit a layer."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import graft
from tests.adapters.references import Twins, assert_bfloat16_as_good
from tests.contract.table import base, ids, logits

MISS = {"D": "miss_block.default"}
GATE = {"target_modules": ["q_proj", "v_proj", "down_proj"]}
SITES = "attn.q attn.v mlp.down"
CASES: list[tuple[str, Any, dict[str, Any]]] = [
    ("llama", graft.MiSS(rank=8, sites=SITES), {"r": 8, **GATE}),
    ("llama", graft.MiSS(rank=7, sites=SITES), {"r": 7, **GATE}),
    ("llama", graft.MiSS(rank=32, sites=SITES), {"r": 32, **GATE}),
    ("llama", graft.MiSS(rank=6, variant="mini", mini_rank=4, sites=SITES), {"r": 6, "init_weights": "mini", "mini_r": 4, **GATE}),
    ("llama", graft.MiSS(rank=8, variant="mini", sites=SITES), {"r": 8, "init_weights": "mini", **GATE}),
    ("llama", graft.MiSS(rank=8, variant="bat", sites=SITES), {"r": 8, "init_weights": "bat", **GATE}),
    ("bert", graft.MiSS(rank=5, sites="attn.q mlp.up"), {"r": 5, "target_modules": ["query", "intermediate.dense"]}),
    ("bert", graft.MiSS(rank=4, variant="bat", sites="attn.q mlp.up"),
     {"r": 4, "init_weights": "bat", "target_modules": ["query", "intermediate.dense"]}),
    ("bloom", graft.MiSS(rank=6, sites="attn.qkv"), {"r": 6, "target_modules": ["query_key_value"]}),
]  # fmt: skip


@pytest.mark.parametrize(("family", "ours", "theirs"), CASES)
def test_outputs_and_gradients_equal_peft(family: str, ours: Any, theirs: dict[str, Any]) -> None:
    peft = pytest.importorskip("peft")
    Twins(family, ours, peft.MissConfig(**theirs), MISS).assert_same()


def test_dropout_falls_where_peft_lets_it_fall() -> None:
    peft = pytest.importorskip("peft")
    ours = graft.MiSS(rank=8, dropout=0.4, sites=SITES)
    Twins("llama", ours, peft.MissConfig(r=8, miss_dropout=0.4, **GATE), MISS).assert_same(training=True)


@pytest.mark.parametrize("case", [1, 3, 5])
def test_merged_weights_equal_those_of_peft(case: int) -> None:
    peft = pytest.importorskip("peft")
    family, ours, theirs = CASES[case]
    Twins(family, ours, peft.MissConfig(**theirs), MISS).assert_same_merged()


@pytest.mark.parametrize("case", [1, 3, 5])
def test_bfloat16_is_at_least_as_close_to_float32_as_in_peft(case: int) -> None:
    peft = pytest.importorskip("peft")
    family, ours, theirs = CASES[case]
    assert_bfloat16_as_good(family, ours, peft.MissConfig(**theirs), MISS)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"rank": 2}, [[1, 2, 1, 2, 1], [3, 4, 3, 4, 3], [5, 6, 5, 6, 5], [7, 8, 7, 8, 7]]),
        ({"rank": 2, "variant": "mini", "mini_rank": 2}, [[1, 2, 1, 2, 1], [3, 4, 3, 4, 3]] * 2),
    ],
)
def test_the_difference_is_the_matrix_laid_side_by_side(settings: dict[str, Any], expected: list[list[int]]) -> None:
    model: Any = nn.Sequential(nn.Linear(5, 4))
    graft.attach(model, {"a": graft.MiSS(**settings, sites="re:0")})
    ((_, D),) = graft.parameters(model, "a")
    before = model[0].weight.detach().clone()
    with torch.no_grad():
        D.copy_(torch.arange(1.0, 1 + D.numel()).view(-1, 2).t())
    x = torch.randn(3, 5)
    computed = model(x)
    graft.merge(model, "a")
    torch.testing.assert_close(model[0].weight - before, torch.tensor(expected, dtype=torch.float32))
    torch.testing.assert_close(model(x), computed)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rank": 64}, "rank: a shard of 64 is larger than the 32 inputs of 'model.layers.0.self_attn.q_proj'"),
        ({"rank": 5, "variant": "bat"}, "rank: variant bat needs one that divides the 32 inputs and 32 outputs of .*given 5"),
        ({"rank": 4, "variant": "mini", "mini_rank": 5}, "mini_rank: 5 does not divide the 32 outputs of"),
        ({"rank": 4, "mini_rank": 2}, "mini_rank: 2 has an effect with variant: mini only; given plain"),
    ],
)  # fmt: skip
def test_settings_that_do_not_fit_are_named(settings: dict[str, Any], message: str) -> None:
    model = base("llama")
    with pytest.raises(graft.GraftError, match=message):
        graft.attach(model, {"a": {"kind": "miss", "sites": "attn.q", **settings}})
    assert graft.names(model) == ()


def test_a_fresh_adapter_leaves_the_output_as_it_was() -> None:
    for variant in ("plain", "bat", "mini"):
        model = base("llama")
        graft.attach(model, {"a": graft.MiSS(rank=8, variant=variant, sites=SITES)})
        assert torch.equal(logits(model, ids()), logits(base("llama"), ids()))

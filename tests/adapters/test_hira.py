"""HiRA: PEFT's numbers, the paper's algebra with a scale, and a base that does not hold its weights."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import graft
from graft.attaching.parameters import modules_of
from graft.injection.state import state_of
from tests.adapters.references import Twins, assert_bfloat16_as_good
from tests.contract.table import base, ids, logits, randomise

HIRA = {"A": "hira_A.default", "B": "hira_B.default"}
CASES: list[tuple[str, Any, dict[str, Any]]] = [
    ("llama", graft.HiRA(rank=5, alpha=5, sites="linear"), {"r": 5, "target_modules": "all-linear"}),
    ("llama", graft.HiRA(rank=48, alpha=48, sites="attn.k"), {"r": 48, "target_modules": ["k_proj"]}),
    ("llama", graft.HiRA(rank=3, alpha=3, dropout=0.4, sites="attn.q mlp.down"),
     {"r": 3, "hira_dropout": 0.4, "target_modules": ["q_proj", "down_proj"]}),
    ("bert", graft.HiRA(rank=4, alpha=4, sites="attn.q mlp.up"), {"r": 4, "target_modules": ["query", "intermediate.dense"]}),
    ("gpt2", graft.HiRA(rank=4, alpha=4, sites="attn.qkv mlp.down"),
     {"r": 4, "target_modules": ["c_attn", "mlp.c_proj"], "fan_in_fan_out": True}),
]  # fmt: skip


@pytest.mark.parametrize(("family", "ours", "theirs"), CASES)
@pytest.mark.parametrize("training", [False, True])
def test_outputs_and_gradients_equal_peft(family: str, ours: Any, theirs: dict[str, Any], training: bool) -> None:
    peft = pytest.importorskip("peft")
    Twins(family, ours, peft.HiraConfig(**theirs), HIRA).assert_same(training)


def test_merged_weights_equal_those_of_peft() -> None:
    peft = pytest.importorskip("peft")
    for family, ours, theirs in (CASES[0], CASES[4]):
        Twins(family, ours, peft.HiraConfig(**theirs), HIRA).assert_same_merged()


def test_bfloat16_is_at_least_as_close_to_float32_as_in_peft() -> None:
    peft = pytest.importorskip("peft")
    family, ours, theirs = CASES[0]
    assert_bfloat16_as_good(family, ours, peft.HiraConfig(**theirs), HIRA)


@pytest.mark.parametrize(("family", "sites"), [("gpt2", "attn.q mlp.up"), ("bloom", "attn.v"), ("llama", "attn.k")])
def test_the_weight_that_is_computed_with_is_w_plus_s_w_times_ba(family: str, sites: str) -> None:
    """On slices of fused and of transposed layers too: W + s W (.) BA written into the plain base, from the paper's equation."""
    model, plain = base(family), base(family)
    graft.attach(model, {"a": graft.HiRA(rank=3, alpha=6, sites=sites)})
    randomise(model, "a")
    for path, module in modules_of(model, state_of(model), "a"):
        A, B = (getattr(module, name).detach() for name in "AB")
        host = plain.get_submodule(path.rpartition(".")[0])
        weight = host.weight.detach()
        W = weight.t() if family == "gpt2" else weight
        rows = module.around.features if module.around.features is not None else slice(None)
        for row, own in zip(torch.arange(len(W))[rows], range(len(B)), strict=True):
            for column in range(W.shape[1]):
                W[row, column] *= 1 + 2 * sum(B[own, r] * A[r, column] for r in range(3))
    torch.testing.assert_close(logits(model, ids()), logits(plain, ids()), atol=3e-5, rtol=0)


def test_a_fresh_adapter_starts_as_peft_does() -> None:
    peft = pytest.importorskip("peft")
    theirs = peft.HiraConfig(r=4, target_modules=["q_proj"])
    twins = Twins("llama", graft.HiRA(rank=4, alpha=4, sites="attn.q"), theirs, HIRA, 0.0)
    for key, (mine, _) in twins.pairs.items():
        bound = 32**-0.5  # kaiming-uniform with a = sqrt(5)
        assert not mine.any() if key.endswith(".B") else 0.9 * bound < mine.abs().max() <= bound


def test_a_base_without_its_weights_is_refused_at_attach() -> None:
    class Packed(nn.Linear):
        def __init__(self) -> None:
            super().__init__(4, 4)
            self.weight = nn.Parameter(torch.zeros(8, dtype=torch.uint8), requires_grad=False)

    for adapter in (graft.HiRA(rank=2, sites="re:0"), graft.MiSS(rank=2, variant="bat", sites="re:0")):
        model = nn.Sequential(Packed())
        with pytest.raises(graft.GraftError, match="reads the frozen weight, but .* has none in floating point"):
            graft.attach(model, {"a": adapter})

"""PiSSA: PEFT's numbers with the base untouched, a saved start, and a plain LoRA of twice the rank that computes the same."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import graft
from graft.adapters.kinds.pissa import PiSSAAdapter
from graft.attaching.parameters import modules_of
from graft.injection.state import state_of
from tests.adapters.references import LORA, Twins
from tests.contract.table import attached, base, ids, logits, pristine, randomise, rows, same_base

ROWS = "llama-pissa llama-pissa-quick gpt2-pissa-fused"


@pytest.mark.parametrize(
    ("family", "ours", "theirs"),
    [
        ("llama", graft.PiSSA(rank=4, alpha=3), {"target_modules": "all-linear"}),
        (
            "llama",
            graft.PiSSA(rank=4, alpha=3, rslora=True, sites="attn.q mlp.down"),
            {"target_modules": ["q_proj", "down_proj"], "use_rslora": True},
        ),
        ("gpt2", graft.PiSSA(rank=4, alpha=3, sites="attn.qkv mlp.down"), {"target_modules": ["c_attn", "mlp.c_proj"]}),
        (
            "bert",
            graft.PiSSA(rank=4, alpha=3, dropout=0.4, sites="attn.q attn.v"),
            {"target_modules": ["query", "value"], "lora_dropout": 0.4},
        ),
    ],
)
@pytest.mark.parametrize("training", [False, True])
def test_outputs_and_gradients_equal_peft(family: str, ours: Any, theirs: dict[str, Any], training: bool) -> None:
    peft = pytest.importorskip("peft")
    fan = {"fan_in_fan_out": family == "gpt2"}
    config = peft.LoraConfig(init_lora_weights="pissa", r=4, lora_alpha=3, **fan, **theirs)
    Twins(family, ours, config, LORA, scale=0.05).assert_same(training)


def test_the_start_is_the_best_approximation_of_the_weight() -> None:
    model = base("llama")
    graft.attach(model, {"a": graft.PiSSA(rank=4, alpha=6, sites="mlp.down")})
    for path, module in modules_of(model, state_of(model), "a"):
        assert isinstance(module, PiSSAAdapter)
        weight = model.get_submodule(path.removesuffix(".linear")).weight
        left = weight - module.scale * (module.B @ module.A)
        values = torch.linalg.svdvals(weight)
        torch.testing.assert_close(torch.linalg.svdvals(left)[: len(values) - 4], values[4:], atol=1e-4, rtol=0)


@rows(ROWS)
def test_disabled_it_is_the_base_and_a_second_one_changes_nothing_of_the_first(row: Any) -> None:
    model, inputs = attached(row), ids()
    expected = logits(model, inputs)
    graft.attach(model, {"b": row.spec})
    randomise(model, "b", 7)
    assert torch.equal(logits(model, inputs), expected)
    with graft.use(model, None):
        assert torch.equal(logits(model, inputs), logits(pristine(row.family), inputs))
    assert same_base(model, row.family)


def test_a_randomised_start_is_the_same_model_under_another_seed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(1)
    model = base("llama")
    graft.attach(model, {"a": graft.PiSSA(rank=4, niter=1)})
    randomise(model, "a")
    expected = logits(model, ids())
    folder = graft.save(model, "a", tmp_path / "a")
    torch.manual_seed(2)

    def refuse(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError("loading takes no decomposition")

    monkeypatch.setattr(torch, "svd_lowrank", refuse)
    monkeypatch.setattr(torch.linalg, "svd", refuse)
    loaded = graft.load(base("llama"), folder)
    assert torch.equal(logits(loaded, ids()), expected)
    graft.copy(loaded, "a", "b")
    with graft.use(loaded, "b"):
        assert torch.equal(logits(loaded, ids()), expected)


@rows(ROWS + " bloom-pissa")
def test_the_plain_lora_of_twice_the_rank_computes_the_same(row: Any) -> None:
    model, plain = attached(row), base(row.family)
    graft.attach(plain, {"b": row.config.to_lora()})
    places = dict(graft.parameters(plain, "b"))
    with torch.no_grad():
        for path, module in modules_of(model, state_of(model), "a"):
            assert isinstance(module, PiSSAAdapter)
            for key, tensor in module.to_lora().items():
                places.pop(f"{path}.{key}").copy_(tensor)
    assert not places
    torch.testing.assert_close(logits(plain, ids()), logits(model, ids()), atol=2e-5, rtol=0)


def test_the_difference_is_exact_near_the_start_in_bfloat16() -> None:
    model = base("llama", None, torch.bfloat16)
    graft.attach(model, {"a": graft.PiSSA(rank=4, sites="mlp.down")})
    (_, module), *_ = modules_of(model, state_of(model), "a")
    assert isinstance(module, PiSSAAdapter)
    x = torch.randn(5, 40, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        module.A.add_(torch.randn_like(module.A) * 1e-4)
        wanted = (
            x.double()
            @ (module.scale * (module.B.double() @ module.A.double() - module.B0.double() @ module.A0.double())).T
        )
        found = module.apply_to(x.bfloat16())
    assert float((found - wanted).norm() / wanted.norm()) < 0.02


def test_a_rank_beyond_the_weights_is_an_error() -> None:
    model = base("llama")
    with pytest.raises(graft.GraftError, match="rank 33 is more than the 32 singular directions"):
        graft.attach(model, {"a": graft.PiSSA(rank=33, sites="attn.q")})
    assert graft.names(model) == ()

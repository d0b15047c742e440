"""OFT: PEFT's numbers for every form of the rotation, block sizes that do not divide, COFT, and the order of merging in a stack."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import graft
from graft.adapters.kinds.oft import nearest_divisor
from graft.attaching.active import running
from graft.attaching.parameters import modules_of
from graft.injection.state import state_of
from graft.routing.context import ForwardContext
from tests.adapters.references import Twins, assert_bfloat16_as_good
from tests.contract.table import base, ids, logits, loss, randomise

OFT = {"angles": "oft_R.default.weight"}
GATE = {"target_modules": ["q_proj", "v_proj", "down_proj"]}
SITES = "attn.q attn.v mlp.down"


def both(
    family: str = "llama", sites: str = SITES, targets: dict[str, Any] = GATE, **settings: Any
) -> tuple[str, Any, dict[str, Any]]:
    """One setting in Graft's fields and in PEFT's."""
    terms, coft, blocks = settings.get("terms", 5), settings.get("coft"), settings.get("blocks", 0)
    theirs = {
        "r": blocks, "oft_block_size": 0 if blocks else settings.get("block_size", 32), "block_share": settings.get("share", False),
        "use_cayley_neumann": terms is not None, "num_cayley_neumann_terms": terms or 5, "coft": coft is not None, "eps": coft or 6e-5,
    }  # fmt: skip
    return family, graft.OFT(**settings, sites=sites), {**theirs, **targets}


CASES = [
    both(block_size=8),
    both(block_size=8, terms=4),
    both(block_size=8, terms=9),
    both(block_size=8, terms=None),
    both(block_size=32),  # the 40 inputs of mlp.down are one block
    both(block_size=7, terms=None),  # 8 at all of them
    both(blocks=3),  # 2 and 4 are as near: two blocks of 16, at mlp.down of 20
    both(block_size=8, share=True),
    both(blocks=2, share=True, terms=None),
    both(block_size=8, coft=0.3),
    both(block_size=8, coft=0.3, terms=None, share=True),
    both("bert", "attn.q mlp.up", {"target_modules": ["query", "intermediate.dense"]}, block_size=16),
    both("bloom", "attn.qkv", {"target_modules": ["query_key_value"]}, block_size=4),
]


@pytest.mark.parametrize(("family", "ours", "theirs"), CASES)
def test_outputs_and_gradients_equal_peft(family: str, ours: Any, theirs: dict[str, Any]) -> None:
    peft = pytest.importorskip("peft")
    Twins(family, ours, peft.OFTConfig(**theirs), OFT, 0.1).assert_same()


@pytest.mark.parametrize("case", [0, 3, 6, 8, 10])
def test_merged_weights_equal_those_of_peft(case: int) -> None:
    peft = pytest.importorskip("peft")
    family, ours, theirs = CASES[case]
    Twins(family, ours, peft.OFTConfig(**theirs), OFT, 0.1).assert_same_merged()


@pytest.mark.parametrize("case", [0, 3, 7])
def test_bfloat16_is_at_least_as_close_to_float32_as_in_peft(case: int) -> None:
    peft = pytest.importorskip("peft")
    family, ours, theirs = CASES[case]
    assert_bfloat16_as_good(family, ours, peft.OFTConfig(**theirs), OFT, 0.1)


def test_block_sizes_are_taken_to_divisors_as_peft_takes_them() -> None:
    pytest.importorskip("peft")
    from peft.tuners.oft.layer import OFTLayer

    for size in (1, 2, 7, 16, 32, 36, 40, 97, 768, 4096, 11008):
        for wanted in (1, 2, 3, 5, 8, 12, 32, 50, 64, 1000, 20000):
            given = (
                wanted if size % wanted == 0 and wanted <= size else OFTLayer.adjust_oft_parameters(None, size, wanted)
            )  # type: ignore[arg-type]
            assert nearest_divisor(size, wanted) == given, (size, wanted)


@pytest.mark.parametrize("exact", [True, False])
def test_the_exact_form_is_orthogonal_and_the_series_nears_its_transpose(exact: bool) -> None:
    model = base("llama")
    graft.attach(model, {"a": graft.OFT(block_size=8, terms=None if exact else 30, sites="attn.q")})
    randomise(model, "a", size=0.1)
    for _, module in modules_of(model, state_of(model), "a"):
        R, one = module.change() + torch.eye(8), torch.eye(8).expand(4, -1, -1)
        torch.testing.assert_close(R @ R.mT, one, atol=1e-5, rtol=0)
        module.terms = None
        torch.testing.assert_close(R if exact else R.mT, module.change() + one, atol=1e-5, rtol=0)


def test_coft_holds_after_each_step_and_in_each_pass() -> None:
    model = base("llama")
    graft.attach(model, {"a": graft.OFT(block_size=8, coft=0.2, sites="attn.q")})
    optimizer = torch.optim.SGD([p for _, p in graft.parameters(model, "a")], lr=5.0)
    for step in range(3):
        loss(model, ids()).backward()
        optimizer.step()
        optimizer.zero_grad()
        expected = logits(model, ids())
        graft.after_step(model, "a", step + 1, 3)
        torch.testing.assert_close(logits(model, ids()), expected, atol=2e-5, rtol=0)
    lengths = torch.cat([2**0.5 * p.norm(dim=1) for _, p in graft.parameters(model, "a")])
    assert (lengths <= 0.2 / 4**0.5 + 1e-7).all() and (lengths > 0.0999).any()


@pytest.mark.parametrize(
    ("family", "parts"),
    [
        ("llama", [graft.OFT(block_size=8, sites="mlp.down"), graft.LoRA(rank=2, sites="mlp.down")]),
        ("llama", [graft.LoRA(rank=2, sites="mlp.down"), graft.OFT(block_size=8, sites="mlp.down")]),
        ("llama", [graft.OFT(block_size=8, sites="mlp.down"), graft.OFT(blocks=2, terms=None, sites="mlp.down")]),
        ("llama", [graft.IA3(sites="mlp.down"), graft.DoRA(rank=2, sites="mlp.down"), graft.OFT(block_size=8, sites="mlp.down")]),
        ("bert", [graft.LLaMAAdapterV2(scale="input", sites="linear"), graft.Hadamard(norm="none"), graft.OFT(block_size=8)]),
        ("gpt2", [graft.OFT(block_size=8, sites="attn.q"), graft.LoRA(rank=2, sites="attn.q"), graft.OFT(blocks=2, sites="attn.qkv")]),
        ("bloom", [graft.OFT(block_size=8, sites="attn.qkv"), graft.HiRA(rank=2, sites="attn.q attn.v")]),
    ],
)  # fmt: skip
def test_a_stack_merges_to_what_it_computes_whatever_its_order(family: str, parts: list[Any]) -> None:
    """Every part reads the input that all of those before the layer have left, wherever these stand in the stack."""
    model = base(family)
    graft.attach(model, {"a": parts})
    randomise(model, "a", size=0.1)
    expected = logits(model, ids())
    graft.merge(model, "a")
    torch.testing.assert_close(logits(model, ids()), expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("spec", [graft.OFT(block_size=8, sites="mlp.down"), graft.HiRA(rank=2, sites="mlp.down")])
def test_a_lora_of_full_rank_computes_the_same(spec: Any, tmp_path: Path) -> None:
    """What servers of LoRA get from `graft export --svd`, of a kind that turns the input and of one that changes the weight."""
    model = base("llama")
    graft.attach(model, {"a": [spec, graft.LoRA(rank=2, sites="mlp.down")]})
    randomise(model, "a", size=0.1)
    graft.export(model, "a", tmp_path / "lora", svd=32)
    again = graft.load(base("llama"), tmp_path / "lora", name="a")
    torch.testing.assert_close(logits(again, ids()), logits(model, ids()), atol=1e-4, rtol=0)


def test_dropout_lets_blocks_of_a_row_pass_by_its_seed_alone() -> None:
    model = base("llama").train()
    graft.attach(model, {"a": graft.OFT(block_size=8, dropout=0.5, sites="attn.q")})
    randomise(model, "a")
    ((_, module), *_) = modules_of(model, state_of(model), "a")
    x = torch.randn(2, 5, 32)
    added = module.turned(x, ForwardContext("a", (5, 3), seeds=(1, 2)).everything).view(2, 5, 4, 8)
    whole = module.eval().turned(x, ForwardContext("a").everything).view(2, 5, 4, 8)
    passed = (added == 0).all(-1)
    assert passed[:, :3].any() and not passed.all()
    torch.testing.assert_close(added[~passed], whole[~passed])
    alone = module.train().turned(x[1:, :3], ForwardContext("a", (3,), seeds=(2,)).everything)
    torch.testing.assert_close(alone.view(3, 4, 8), added[1, :3])
    with running(model, ForwardContext("a", (7, 7, 7), seeds=(1, 2, 3))):
        assert torch.equal(logits(model, ids()), logits(model, ids()))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"block_size": 8, "blocks": 4}, "give block_size or blocks; given block_size: 8, blocks: 4"),
        ({"block_size": None}, "give block_size or blocks; given block_size: None, blocks: None"),
        ({"blocks": 32}, "'model.layers.0.self_attn.q_proj' has 32 inputs, which would fall into blocks of one"),
        ({"terms": 1}, "terms must be greater than or equal to 2; given: 1"),
    ],
)
def test_settings_that_do_not_fit_are_named(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(graft.GraftError, match=message):
        graft.attach(base("llama"), {"a": {"kind": "oft", "sites": "attn.q", **settings}})


def test_a_number_of_blocks_needs_no_size_and_a_config_says_itself_again() -> None:
    config = graft.OFT(blocks=4)
    assert config.block_size is None and graft.OFT.model_validate(config.model_dump()) == config
    assert graft.OFT().block_size == 32

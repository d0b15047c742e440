"""Point 6: a merged adapter computes the same, twice is once, unmerge restores bit for bit, and a kind that cannot merge says so."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import graft
from graft.injection.state import state_of
from tests.contract.table import Row, attached, base, base_tensors, check, ids, logits, randomise, rows, same_base


@rows()
def test_a_merged_adapter_computes_the_same_and_unmerge_restores_bit_for_bit_or_merging_says_why_not(row: Row) -> None:
    check("merges_or_refuses", row)


@rows("llama-lora bloom-lora-fused gpt2-lora-fused")
def test_merging_into_bfloat16_is_as_close_as_bfloat16_weights_can_be(row: Row) -> None:
    model = attached(row, None, torch.bfloat16)
    before = {name: tensor.clone() for name, tensor in base_tensors(model)}
    exact = attached(row, None, torch.float32)
    with torch.no_grad():
        for name, tensor in base_tensors(exact):
            tensor.copy_(before[name])
    graft.merge(model, "a")
    graft.merge(exact, "a")
    wanted = dict(base_tensors(exact))
    assert all(torch.equal(tensor, wanted[name].bfloat16()) for name, tensor in base_tensors(model))
    graft.unmerge(model, "a")
    assert all(torch.equal(tensor, before[name]) for name, tensor in base_tensors(model))


@rows("llama-lora")
def test_while_merged_the_base_and_other_adapters_are_not_to_be_had(row: Row, tmp_path: Path) -> None:
    model = attached(row, None, torch.float32, "a", "b")
    folder = graft.save(model, "a", tmp_path / "before")
    graft.merge(model, "a")
    for attempt in (
        lambda: graft.use(model, "b").__enter__(),
        lambda: graft.use(model, None).__enter__(),
        lambda: graft.merge(model, "b"),
        lambda: graft.detach(model, "a"),
        lambda: graft.attach(model, {"c": graft.LoRA(rank=2)}),
    ):
        with pytest.raises(graft.GraftError, match=r"graft.unmerge\(model, 'a'\)"):
            attempt()
    again = graft.save(model, "a", tmp_path / "merged")
    assert all((again / file.name).read_bytes() == file.read_bytes() for file in folder.iterdir())
    graft.rename(model, "a", "z")
    with pytest.raises(graft.GraftError, match=r"'b' is not merged \('z' is\)"):
        graft.unmerge(model, "b")
    graft.unmerge(model, "z")
    assert same_base(model, "llama")


@rows("llama-lora")
def test_nothing_trains_while_merged_and_what_was_active_is_so_behind_it(row: Row) -> None:
    model = attached(row, None, torch.float32, "a", "b")
    with graft.use(model, None), pytest.raises(graft.GraftError, match="outside of graft.use"):
        graft.merge(model, "b")
    graft.merge(model, "b")
    assert not any(p.requires_grad for p in model.parameters())
    graft.unmerge(model, "b")
    assert {name: all(p.requires_grad for _, p in graft.parameters(model, name)) for name in "ab"} == {
        "a": True,
        "b": False,
    }
    assert state_of(model).current.rows == "a"
    inputs = ids(2, 5)
    graft.set_active(model, {"a": 0.5, "b": 1.0})
    together = logits(model, inputs)
    graft.merge(model, "b")
    with pytest.raises(graft.GraftError, match="serves rows together with others"):
        graft.rename(model, "a", "z")
    graft.unmerge(model, "b")
    assert torch.equal(logits(model, inputs), together)


def test_dropped_originals_and_tied_weights_are_said() -> None:
    model = base("llama")
    graft.attach(model, {"a": graft.LoRA(rank=2)})
    graft.merge(model, "a", keep=False)
    with pytest.raises(graft.GraftError, match="were dropped"):
        graft.unmerge(model, "a")
    tied = base("gpt2")
    graft.attach(tied, {"a": graft.Full(sites="head")})
    randomise(tied, "a")
    with pytest.raises(graft.GraftError, match=r"shares its weight with 'transformer.wte'"):
        graft.merge(tied, "a")
    assert same_base(tied, "gpt2")


def test_a_fresh_adapter_whose_merge_changes_nothing_can_be_unmerged() -> None:
    model = base("llama")
    graft.attach(model, {"a": graft.LoRA(rank=2)})
    graft.merge(model, "a")
    graft.unmerge(model, "a")
    assert same_base(model, "llama") and state_of(model).merged is None


def test_an_adapter_of_a_plain_module_merges() -> None:
    torch.manual_seed(0)
    model: nn.Module = nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 4))
    graft.attach(
        model,
        {"a": [{"kind": "lora", "rank": 2, "train_bias": True, "sites": "re:[01]"}, {"kind": "full", "sites": "re:1"}]},
    )
    randomise(model, "a")
    x = torch.randn(3, 6)
    expected = model(x)
    graft.merge(model, "a")
    torch.testing.assert_close(model(x), expected)


@pytest.mark.parametrize(
    ("family", "parts"),
    [
        ("llama", [graft.LoRA(rank=2, sites="mlp.down"), graft.IA3(sites="mlp.down")]),
        ("llama", [graft.IA3(sites="mlp.down"), graft.DoRA(rank=2, sites="mlp.down"), graft.LoRA(rank=2, sites="mlp.down")]),
        ("bert", [graft.LLaMAAdapterV2(scale="input"), graft.LoRA(rank=2, train_bias=True, sites="linear")]),
    ],
)  # fmt: skip
def test_a_stack_with_a_part_before_the_layer_merges_to_what_it_computes(family: str, parts: list[Any]) -> None:
    """All parts read the input that those before the layer have left, wherever these stand in the stack."""
    for order in (parts, parts[::-1]):
        model = base(family)
        graft.attach(model, {"a": order})
        randomise(model, "a", size=0.1)
        expected = logits(model, ids())
        graft.merge(model, "a")
        torch.testing.assert_close(logits(model, ids()), expected, atol=1e-4, rtol=0)

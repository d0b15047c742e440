"""A trained adapter by reference: it computes as it did, nothing of it trains, and files hold where it is instead of its weights."""

from __future__ import annotations

import copy
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import graft
from graft.adapters.kinds.trained import Trained
from graft.attaching.parameters import adapter_modules
from graft.attaching.saving import training_state
from graft.errors import GraftError
from tests.contract.table import Row, base, ids, logits, loss, randomise, rows, with_adapters

TOP = {"kind": "lora", "rank": 3, "alpha": 6, "sites": "linear"}


def saved(row: Row, folder: Path) -> Any:
    model = with_adapters(row.family, a=row.config)
    graft.save(model, "a", folder)
    return model


CHOSEN = (
    "llama-series-into-mlp llama-prefix-projection gptj-llama-adapter-stack gpt2-llama-adapter-v2 bert-prompt t5-prompt-stack "
    "gptj-compacter gpt2-fusion-lora bert-vera-drawn qwen3-dora-dropout gemma2-pissa-quick qwen3-adalora gptj-oft t5-head-whole"
)


@rows(CHOSEN)
def test_a_second_adapter_trains_on_top_of_a_trained_one(row: Row, tmp_path: Path) -> None:
    check_on_top(row, tmp_path)


@pytest.mark.slow
@rows(where=lambda row: row.id not in CHOSEN.split())
def test_a_second_adapter_trains_on_top_of_any(row: Row, tmp_path: Path) -> None:
    check_on_top(row, tmp_path)


def check_on_top(row: Row, tmp_path: Path) -> None:
    first = saved(row, tmp_path / "first")
    model = base(row.family)
    graft.attach(model, {"b": [{"from": str(tmp_path / "first")}, TOP]})
    torch.testing.assert_close(logits(model, ids()), logits(first, ids()), atol=1e-5, rtol=1e-5)  # B starts at zero
    alone = base(row.family)
    graft.attach(alone, {"b": TOP})
    trains = dict(graft.parameters(model, "b"))
    assert sum(p.numel() for p in trains.values()) == sum(p.numel() for _, p in graft.parameters(alone, "b"))
    assert set(training_state(model, "b")) == set(trains)
    assert len(adapter_modules(model, "b")) >= len(adapter_modules(alone, "b"))
    frozen = [p for p in model.parameters() if not p.requires_grad]
    assert len(frozen) == len(list(base(row.family).parameters()))
    randomise(model, "b")
    model.train()
    loss(model, ids()).backward()
    assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in trains.values())
    model.eval()
    wanted = logits(model, ids())
    torch.testing.assert_close(logits(copy.deepcopy(model), ids()), wanted, atol=0, rtol=0)
    graft.save(model, "b", tmp_path / "second")
    assert set(load_file(tmp_path / "second" / "adapter_model.safetensors")) == set(trains)
    again = graft.load(base(row.family), tmp_path / "second", name="again")
    torch.testing.assert_close(logits(again, ids()), wanted, atol=0, rtol=0)


FIRST = {"kind": "lora", "rank": 2, "sites": "attn.q mlp.down"}


@pytest.fixture
def first(tmp_path: Path) -> Path:
    model = with_adapters("llama", a=FIRST)
    return graft.save(model, "a", tmp_path / "first")


def on_top(folder: Path) -> Any:
    model = base("llama")
    graft.attach(model, {"b": [{"from": str(folder), "frozen": True}, TOP]})
    randomise(model, "b")
    return model


def test_merging_folds_both(first: Path) -> None:
    model = on_top(first)
    wanted = logits(model, ids())
    graft.merge(model, "b")
    torch.testing.assert_close(logits(model, ids()), wanted, atol=1e-4, rtol=1e-4)
    graft.unmerge(model, "b")
    torch.testing.assert_close(logits(model, ids()), wanted, atol=0, rtol=0)


def test_rows_moves_and_names_follow(first: Path) -> None:
    model = on_top(first)
    wanted, plain = logits(model, ids()), logits(base("llama"), ids())
    with graft.route(model, ["b", None, "b"]):
        mixed = logits(model, ids())
    torch.testing.assert_close(mixed[[0, 2]], wanted[[0, 2]], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(mixed[1], plain[1], atol=1e-5, rtol=1e-5)
    graft.rename(model, "b", "c")
    torch.testing.assert_close(logits(model.double(), ids()).float(), wanted, atol=1e-4, rtol=1e-4)
    graft.detach(model)
    assert not any("held" in module.__dict__ for module in model.modules())


def test_weights_that_are_gone_or_others_are_named(first: Path, tmp_path: Path) -> None:
    graft.save(on_top(first), "b", tmp_path / "second")
    digest = Trained.model_validate({"folder": str(first)}).digest
    weights = first / "adapter_model.safetensors"
    tensors = load_file(weights)
    save_file({key: tensor + 1 for key, tensor in tensors.items()}, weights)
    with pytest.raises(
        GraftError, match=f"on top of the one in {first}, which holds other weights by now .*not {digest}"
    ):
        graft.load(base("llama"), tmp_path / "second")
    shutil.rmtree(first)
    with pytest.raises(
        GraftError, match=f"on top of the one in {first}, which is not there .*digest of its weights is {digest}"
    ):
        graft.load(base("llama"), tmp_path / "second")


def test_a_moved_folder_is_found_at_its_new_place(first: Path, tmp_path: Path) -> None:
    model = on_top(first)
    second, new = graft.save(model, "b", tmp_path / "second"), tmp_path / "elsewhere"
    first.rename(new)
    with pytest.raises(GraftError, match=f"does not refer to {new}; it refers to {first}"):
        graft.load(base("llama"), second, moved={str(new): str(first)})
    again = graft.load(base("llama"), second, name="again", moved={str(first): new})
    torch.testing.assert_close(logits(again, ids()), logits(model, ids()), atol=0, rtol=0)
    third = graft.save(again, "again", tmp_path / "third")
    graft.load(base("llama"), third)  # it holds the new place


def test_an_adapter_of_another_base_is_refused(first: Path) -> None:
    other = base("llama")
    with torch.no_grad():
        next(other.parameters()).add_(1)
    with pytest.raises(GraftError, match="first was made for"):
        graft.attach(other, {"b": [{"from": str(first)}, TOP]})
    assert graft.names(other) == ()


@pytest.mark.parametrize(
    ("part", "message"),
    [
        ({"from": "nowhere"}, "nowhere holds no adapter: adapter_config.json is missing"),
        ({"from": "FIRST", "frozen": False}, "frozen"),
        ({"from": "FIRST", "rank": 3}, "adapter kind 'trained' has no field 'rank'"),
        ([{"from": "FIRST"}, {"from": "FIRST"}], "first is named twice: name it once"),
        ({"from": "RUN"}, "is a run with several adapters or none \\(a, b\\): name one, as"),
        ({"from": "PEFT"}, "does not hold one adapter in Graft's own format: convert it with graft import"),
    ],
)
def test_references_that_lead_nowhere_are_refused(first: Path, tmp_path: Path, part: Any, message: str) -> None:
    for name in "ab":
        shutil.copytree(first, tmp_path / "run" / "adapters" / name)
    model = with_adapters("llama", a=FIRST)
    graft.export(model, "a", tmp_path / "peft")
    places = {"FIRST": str(first), "RUN": str(tmp_path / "run"), "PEFT": str(tmp_path / "peft")}
    parts = [
        {**each, "from": places.get(each["from"], each["from"])}
        for each in (part if isinstance(part, list) else [part])
    ]
    with pytest.raises(GraftError, match=message):
        graft.attach(model, {"b": [*parts, TOP]})
    assert graft.names(model) == ("a",)


@pytest.mark.parametrize("kind", ["lora", "vera", "adalora", "compacter"])
def test_a_trained_adapter_inside_a_gate_or_a_sum_computes_as_it_did(kind: str, tmp_path: Path) -> None:
    sites = "mlp.down" if kind != "compacter" else "mlp"
    first = with_adapters("llama", a={"kind": kind, "sites": sites})
    graft.save(first, "a", tmp_path / "first")
    held = {"from": str(tmp_path / "first")}
    model = base("llama")
    graft.attach(model, {
        "open": {"kind": "gate", "of": held, "per": "token", "init_bias": 40.0, "init_std": 0.0},
        "half": {"kind": "gate", "of": held, "per": "token"},
        "sum": {"kind": "sum", "of": [held, {"kind": "parallel", "bottleneck": 2, "sites": sites}]},
    })  # fmt: skip
    for name in ("open", "sum"):  # a fresh parallel changes nothing
        with graft.use(model, name):
            torch.testing.assert_close(logits(model, ids()), logits(first, ids()), atol=1e-5, rtol=1e-5)
    assert {key.rpartition(".")[2] for key, _ in graft.parameters(model, "half")} == {
        "weight",
        "bias",
    }  # of the gates alone
    randomise(model, "half")
    graft.save(model, "half", tmp_path / "half")
    again = graft.load(base("llama"), tmp_path / "half", name="half")
    with graft.use(model, "half"):
        assert torch.equal(logits(again, ids()), logits(model, ids()))
        assert not torch.allclose(logits(model, ids()), logits(first, ids()), atol=1e-3)


def test_a_run_in_which_nothing_trains_says_so(first: Path) -> None:
    from graft.training.trainable import TrainedAdapter

    model = base("llama")
    graft.attach(model, {"b": {"from": str(first)}})
    with pytest.raises(GraftError, match="nothing of adapter 'b' trains: all of it is there by reference"):
        TrainedAdapter(model, "b")
    with pytest.raises(GraftError, match="a trained adapter by reference .from. is frozen"):
        graft.attach(model, {"c": {"kind": "mixture", "of": {"from": str(first)}}})


def test_weights_that_were_changed_after_saving_are_named_at_the_first_attach(first: Path) -> None:
    weights = first / "adapter_model.safetensors"
    save_file({key: tensor + 1 for key, tensor in load_file(weights).items()}, weights)
    with pytest.raises(GraftError, match="first, which holds other weights by now"):
        graft.attach(base("llama"), {"b": [{"from": str(first)}, TOP]})

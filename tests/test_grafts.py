"""The container of one module's adapters: rows, runs of segments, carried inputs, names that attach and detach."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

import graft
from graft.attaching.active import running, set_trainable
from graft.attention import flat_attention
from graft.injection.container import AdapterContainer
from graft.injection.state import state_of
from graft.routing.context import ForwardContext
from tests.contract.table import base, ids, logits, pristine, randomise


def two_layers() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 4))


def grafted(*names: str, spec: object = None) -> nn.Module:
    model = two_layers()
    graft.attach(model, {name: spec or graft.LoRA(rank=2, sites="re:[01]") for name in names})
    for number, name in enumerate(names):
        randomise(model, name, number)
    return model


def run(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model(x)


def test_rows_of_a_routed_batch_are_put_back_in_their_places() -> None:
    model, x = grafted("a", "b"), torch.randn(5, 3, 6)
    for order in (("a", "b", None, "b", "a"), ("b", "b", None, None, "a"), (None, "a", "a", "a", "a"), (None,) * 5):
        with graft.route(model, order):
            mixed = run(model, x)
        for row, name in enumerate(order):
            with graft.use(model, name):
                torch.testing.assert_close(mixed[row : row + 1], run(model, x[row : row + 1]))


def test_a_routed_batch_of_another_size_is_an_error() -> None:
    model = grafted("a")
    with (
        graft.route(model, ["a", None]),
        pytest.raises(graft.GraftError, match="the batch has 3 rows, but the routing names 2"),
    ):
        model(torch.randn(3, 6))


@pytest.mark.parametrize("rows", [[], "a", None, {"a": 0.5}])
def test_a_routing_that_is_no_list_of_choices_is_an_error(rows: Any) -> None:
    with (
        pytest.raises(graft.GraftError, match="a routing is a list with a choice for each row"),
        graft.route(grafted("a"), rows),
    ):
        pass


def test_an_input_given_by_name_is_changed_too() -> None:
    model = nn.Sequential(nn.Linear(6, 6))
    graft.attach(model, {"a": graft.Series(bottleneck=2, position="before", init="bert", sites="re:0")})
    x = torch.randn(2, 6)
    assert torch.equal(model[0](input=x), model[0](x))


def test_one_name_may_have_several_runs_of_segments_in_a_flat_batch() -> None:
    model = base("llama")
    graft.attach(
        model,
        {
            "a": graft.Parallel(bottleneck=4, init="bert", sites="attn mlp"),
            "b": graft.Series(bottleneck=4, init="bert"),
        },
    )
    for name in "ab":
        randomise(model, name)
    x, names = ids(4, 5), ("a", None, "a", "b")
    with flat_attention(model), running(model, ForwardContext(names, (5,) * 4, flat=True)):
        flat = logits(
            model,
            x.reshape(1, -1),
            position_ids=torch.arange(5).repeat(4)[None],
            attention_mask=torch.zeros(1, 1, 1, 1),
            use_cache=False,
        )
    with graft.route(model, names):
        torch.testing.assert_close(flat.view(4, 5, -1), logits(model, x), atol=1e-5, rtol=0)


@pytest.mark.parametrize("family", ["llama", "bloom", "gptj"])
def test_segments_of_a_flat_batch_stay_apart_while_an_adapter_is_merged(family: str) -> None:
    model, x = base(family), ids(2, 5)
    graft.attach(model, {"a": graft.LoRA(rank=2), "b": graft.Prefix(tokens=2)})
    randomise(model, "a")
    graft.merge(model, "a")
    settings = (
        {}
        if family == "bloom"
        else {"position_ids": torch.arange(5).repeat(2)[None], "attention_mask": torch.zeros(1, 1, 1, 1)}
    )
    with flat_attention(model), running(model, ForwardContext("a", (5, 5), flat=True)):
        flat = logits(model, x.reshape(1, -1), use_cache=False, **settings)
    torch.testing.assert_close(flat.view(2, 5, -1), logits(model, x), atol=1e-5, rtol=0)


def test_nothing_of_a_forward_pass_is_left_behind() -> None:
    model = base("llama")
    graft.attach(model, {"a": graft.Parallel(bottleneck=4, sites="attn mlp"), "b": graft.Parallel(bottleneck=4)})
    for rows in ("a", ("a", "b", None)):
        with running(model, ForwardContext(rows)):
            logits(model, ids())
    links = [
        link
        for module in model.modules()
        if isinstance(module, AdapterContainer)
        for table in module.hooks.adapt.values()
        for link in table
    ]
    assert len(links) == 6 and all(link.x is None for link in links)


@pytest.mark.parametrize("name", ["forward", "eval", "lora", "weight", "graft", "hooks", "0", "a-b"])
def test_any_word_may_be_an_adapters_name(name: str) -> None:
    model, x = grafted(name, "other"), torch.randn(2, 6)
    assert {f"{layer}.graft.{each}.linear.{part}" for layer in "01" for each in (name, "other") for part in "AB"} == {
        key for key in model.state_dict() if "graft" in key.split(".")
    }
    with graft.use(model, name):
        assert not torch.equal(run(model, x), run(two_layers(), x))
    assert torch.equal(run(copy.deepcopy(model), x), run(model, x))
    graft.detach(model, name)
    assert graft.names(model) == ("other",)


@pytest.mark.parametrize("name", ["", "a.b", "a b", "ä", "_a", "training"])
def test_a_name_that_cannot_be_part_of_a_tensors_name_is_refused(name: str) -> None:
    with pytest.raises(graft.GraftError, match="is not an adapter name"):
        graft.attach(two_layers(), {name: graft.LoRA(sites="re:0")})


@pytest.mark.parametrize("given", [None, ["lora"], graft.LoRA()], ids=["none", "list", "no name"])
def test_adapters_without_names_are_refused(given: Any) -> None:
    with pytest.raises(graft.GraftError, match=r"by name, such as \{'task': graft.LoRA\(rank=8\)\}; given: "):
        graft.attach(base("llama"), given)


def test_a_layer_keeps_working_when_its_own_adapter_is_detached_before_the_others() -> None:
    model = base("llama")
    graft.attach(model, {"a": graft.Series(bottleneck=4, init="bert", sites="layer"), "b": graft.LoRA(rank=2)})
    graft.detach(model, "a")
    assert torch.equal(logits(model, ids()), logits(pristine("llama"), ids()))
    graft.detach(model, "b")
    assert type(model.model.layers[0]) is type(pristine("llama").model.layers[0])


def test_an_adapter_that_trains_can_be_detached_and_another_attached() -> None:
    model = grafted("a", "b")
    set_trainable(model, ["a", "b"])
    graft.detach(model, "b")
    graft.attach(model, {"c": graft.LoRA(rank=2, sites="re:0")})
    assert {name: all(p.requires_grad for _, p in graft.parameters(model, name)) for name in "ac"} == {
        "a": True,
        "c": False,
    }


def test_renaming_and_detaching_inside_a_context_hold_behind_it() -> None:
    model, x = grafted("a", "b"), torch.randn(2, 6)
    expected = run(model, x)
    with graft.use(model, "b"):
        graft.rename(model, "a", "z")
        graft.detach(model, "b")
        assert torch.equal(run(model, x), run(two_layers(), x))
    assert state_of(model).current.rows == "z"
    assert torch.equal(run(model, x), expected)
    with graft.use(model, None):
        graft.detach(model, "z")
    assert torch.equal(run(model, x), run(two_layers(), x)) and type(model) is nn.Sequential


def test_a_failed_attach_leaves_the_model_as_it_was() -> None:
    model = base("llama")
    before = list(model.state_dict())
    with pytest.raises(graft.GraftError, match=r"matches nothing.*mlp\.down"):
        graft.attach(model, {"a": graft.LoRA(rank=2), "b": graft.LoRA(sites="mlp.dwon")})
    model.model.unused = nn.Linear(2, 2)
    with pytest.raises(graft.GraftError, match="never called"):
        graft.attach(model, {"a": graft.LoRA(rank=2), "b": graft.LoRA(rank=2, sites="re:model.unused")})
    del model.model.unused
    assert list(model.state_dict()) == before and graft.names(model) == ()
    assert type(model) is type(pristine("llama")) and all(p.requires_grad for p in model.parameters())


def test_what_was_proved_is_proved_again_when_other_code_has_hooked_the_model_since() -> None:
    model = base("llama")
    graft.attach(model, {"a": graft.LoRA(rank=2, sites="mlp.up")})
    for layer in model.model.layers:
        layer.mlp.forward = lambda x: x  # a hook of other code, which no longer calls the layers of the MLP
    with pytest.raises(graft.GraftError, match="2 of 2 sites are never called"):
        graft.attach(model, {"b": graft.LoRA(rank=2, sites="mlp.up")})
    assert graft.names(model) == ("a",)


def test_a_model_that_was_wrapped_since_is_refused_whoever_reads_its_sites_first() -> None:
    peft = pytest.importorskip("peft")
    model = base("llama")
    graft.attach(model, {"a": graft.LoRA(rank=2, sites="mlp.up")})
    peft.inject_adapter_in_model(peft.LoraConfig(target_modules=["q_proj"]), model)
    graft.sites(model)
    with pytest.raises(graft.GraftError, match="already wrapped by PEFT"):
        graft.attach(model, {"b": graft.LoRA(rank=2, sites="mlp.up")})

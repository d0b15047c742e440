"""Mixtures against algebra: one expert is the plain adapter, equal experts are their mean, and the mean is what is saved and merged."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import graft
from graft.adapters.kinds.mixture import MixtureAdapter
from graft.attaching.active import running
from graft.attaching.saving import training_state
from graft.injection.state import state_of
from graft.routing.context import ForwardContext
from tests.contract.table import base, ids, logits, loss, randomise

SERIES = graft.Series(bottleneck=6, init="bert", activation="gelu", sites="mlp")
LORA = graft.LoRA(rank=4, dropout=0.3, sites="attn.q mlp.down")
INNER = {
    "series": (SERIES, "up"),
    "series-both": (SERIES, "none"),
    "lora": (LORA, "up"),
    "lora-down": (LORA, "down"),
    "ia3": (graft.IA3(), "none"),
    "compacter": (graft.Compacter(bottleneck=8, rule_std=0.5), "down"),
    "dora": (graft.DoRA(rank=4, sites="attn.q mlp.down"), "up"),
}
inner = pytest.mark.parametrize("of, share", INNER.values(), ids=list(INNER))


def mixed(of: Any, share: Any, experts: int = 4, **settings: Any) -> Any:
    """A model with a mixture whose experts differ."""
    model = base("llama")
    torch.manual_seed(3)
    graft.attach(model, {"a": graft.Mixture(of=of, share=share, experts=experts, **settings)})
    randomise(model, "a")
    return model


def modules(model: Any) -> list[MixtureAdapter]:
    found = [each.module for each in state_of(model).adapter("a").installs]
    assert all(isinstance(each, MixtureAdapter) for each in found)
    return found  # pyright: ignore


def stacks(model: Any) -> list[Tensor]:
    return [stack for each in modules(model) for stack in each.experts.tensors().values()]


@inner
def test_one_expert_is_the_plain_adapter(of: Any, share: Any) -> None:
    gradients = []
    for config in (of, graft.Mixture(of=of, share=share).model_copy(update={"experts": 1})):
        model = base("llama")
        torch.manual_seed(3)
        graft.attach(model, {"a": config})
        randomise(model, "a")
        model.train()
        with running(model, ForwardContext("a", seeds=(1, 2))):
            value = loss(model, ids(2))
        value.backward()
        gradients.append([value.detach(), *(p.grad for _, p in graft.parameters(model, "a"))])
        gradients[-1] += [logits(model.eval(), ids()).detach()]
    assert all(torch.equal(one.squeeze(), other.squeeze()) for one, other in zip(*gradients, strict=True))


@inner
def test_equal_experts_are_their_mean(of: Any, share: Any) -> None:
    model = mixed(of.model_copy(update={"dropout": 0.0}) if hasattr(of, "dropout") else of, share, experts=3)
    with torch.no_grad():
        for stack in stacks(model):
            stack[:] = stack[1].clone()
    assert torch.equal(logits(model.train(), ids()), logits(model.eval(), ids()))


@inner
def test_what_is_saved_is_the_mean_as_a_plain_adapter(of: Any, share: Any, tmp_path: Path) -> None:
    model = mixed(of, share)
    means = [stack.detach().double().mean(0) for stack in stacks(model)]
    graft.save(model, "a", tmp_path / "a")
    fresh = base("llama")
    graft.load(fresh, tmp_path / "a", name="a")
    assert state_of(fresh).adapter("a").config == of
    saved = training_state(fresh, "a")
    for mean in means:  # numbers of a second implementation: torch's own mean, in double precision
        assert any(
            mean.shape == each.shape and torch.allclose(each.double(), mean, atol=1e-6) for each in saved.values()
        )
    assert torch.equal(logits(fresh, ids()), logits(model.eval(), ids()))


@pytest.mark.parametrize("name", ["lora", "lora-down", "ia3", "dora"])
def test_a_merged_mixture_computes_what_evaluation_computes(name: str) -> None:
    of, share = INNER[name]
    model = mixed(of, share).eval()
    wanted = logits(model, ids())
    graft.merge(model, "a")
    assert torch.allclose(logits(model, ids()), wanted, atol=1e-5)
    with pytest.raises(graft.GraftError, match="cannot be merged"):
        graft.merge(mixed(SERIES, "up"), "a")


def test_evaluation_is_never_stale() -> None:
    model = mixed(LORA, "up").eval()
    before = logits(model, ids())
    loss(model.train(), ids()).backward()
    with torch.no_grad():
        for _, parameter in graft.parameters(model, "a"):
            parameter -= 0.5 * parameter.grad  # pyright: ignore
    assert not torch.allclose(logits(model.eval(), ids()), before, atol=1e-4)


@pytest.mark.parametrize("share, draws", [("up", 1), ("none", 2)])
def test_a_pass_draws_one_expert_for_each_site_and_half(
    share: Any, draws: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, drawn = mixed(SERIES, share), []

    def watched(module: MixtureAdapter, *given: Any) -> Any:
        numbers = draw(module, *given)
        assert len(set(numbers)) == 1  # one for all rows
        drawn.append((module.site_index, numbers[0]))
        return numbers

    draw = MixtureAdapter._draw
    monkeypatch.setattr(MixtureAdapter, "_draw", watched)
    assert all(each.experts.draws == draws for each in modules(model))
    torch.manual_seed(0)
    for _ in range(20):
        logits(model.train(), ids(4))
    assert len(drawn) == 20 * len(modules(model))
    assert all(len(numbers) == draws for _, numbers in drawn)
    for site in range(len(modules(model))):
        assert {numbers[0] for at, numbers in drawn if at == site} == {0, 1, 2, 3}
    assert [numbers for at, numbers in drawn if at == 0] != [numbers for at, numbers in drawn if at == 1]


def expected(model: Any, row: int, seed: int) -> Tensor:
    """The output of a row alone, whose experts are put into a plain adapter by hand."""
    plain = base("llama")
    graft.attach(plain, {"a": SERIES})
    numbers = {
        each.site_index: each._of_rows(ForwardContext("a", seeds=(seed,)).everything, 1)[0] for each in modules(model)
    }
    with torch.no_grad():
        for each, own in zip(modules(model), state_of(plain).adapter("a").installs, strict=True):
            for name, parameter in own.module.named_parameters():
                stack = each.of.get_parameter(name)
                parameter.copy_(stack[numbers[each.site_index][0]] if name in each.experts.stacked else stack)
    return logits(plain, ids(3)[row : row + 1])[0].detach()


@pytest.mark.parametrize("route", ["pass", "row"])
def test_each_row_runs_through_the_expert_that_its_seed_draws(route: Any) -> None:
    model = mixed(SERIES, "up", route=route).train()
    shared = (21, 22, 21)  # rows of two views in one batch
    seeds = shared if route == "pass" else (1, 2, 3)
    with running(model, ForwardContext(("a", "a", "a"), seeds=(1, 2, 3), pass_seeds=shared)):
        together = logits(model, ids(3)).detach()
    for row, seed in enumerate(seeds):
        assert torch.allclose(together[row], expected(model, row, seed), atol=1e-5)
    assert not torch.allclose(together[1], expected(model, 1, 5), atol=1e-3)


def test_tokens_run_through_the_experts_that_they_draw() -> None:
    """Each token of a layer has the output of one of the experts."""
    model = mixed(graft.Parallel(bottleneck=6, sites="mlp@0"), "up", route="token").train()
    (module,) = modules(model)
    x = torch.randn(2, 5, 32)
    out = module.adapt(x, torch.zeros(2, 5, 32), ForwardContext("a", seeds=(1, 2)).everything)
    each = []
    for expert in range(4):
        u = torch.relu(
            torch.nn.functional.linear(x, *(module.of.get_parameter(f"f.down.{n}")[expert] for n in ("weight", "bias")))
        )
        each.append(torch.nn.functional.linear(u, *(module.of.get_parameter(f"f.up.{n}") for n in ("weight", "bias"))))
    fits = torch.stack([(out - one).abs().amax(-1) < 1e-5 for one in each])  # [M, B, L]
    assert fits.any(0).all() and (fits.sum((1, 2)) > 0).sum() > 1


def test_before_and_adapt_of_a_pass_see_one_expert() -> None:
    """A kind that changes input and output: with unequal experts, any other pairing gives another output."""
    of = graft.LLaMAAdapterV2(scale="input", sites="mlp.down@0")
    parts = of.parts()
    model = base("llama")
    graft.attach(model, {"a": graft.Mixture(of=parts[0], experts=2)})
    randomise(model, "a")
    (module,) = modules(model)
    found = set()
    for seed in range(8):
        torch.manual_seed(seed)
        out = logits(model.train(), ids())
        found.add(round(float(out.double().sum()), 3))
        assert not module._drawn
    assert len(found) == 2


@pytest.mark.parametrize(
    "given, said",
    [
        ({"of": "lora", "experts": 1}, "experts"),
        ({"of": "lora", "experts": 0}, "experts"),
        ({"of": "prefix"}, "kind prefix acts at attention sites, but experts need"),
        ({"of": "ia3", "share": "up"}, "kind ia3 has no halves, so experts cannot share its up half"),
        ({"of": "adalora"}, "its experts have no mean"),
        ({"of": "lora", "route": "word"}, "route"),
    ],
)
def test_what_cannot_be_a_mixture_is_named(given: Any, said: str) -> None:
    with pytest.raises(graft.GraftError, match=said):
        graft.Mixture(**given)


def test_a_site_where_the_inner_kind_has_no_experts_is_named() -> None:
    with pytest.raises(
        graft.GraftError, match="puts tokens before the sequence at 'embed', but it takes an adapter that acts around"
    ):
        graft.attach(base("llama"), {"a": graft.Mixture(of="prompt")})
    with pytest.raises(graft.GraftError, match="attn"):
        graft.attach(base("llama"), {"a": graft.Mixture(of="lora", sites="attn")})

"""A composite around any kind: what belongs to the inner kind has to reach it, so an identity composite is the bare kind bit for bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import graft
from graft.adapters import registry
from graft.adapters.base import Adapter
from graft.adapters.composite import Composite, wrap
from graft.architectures.site import SiteSpec
from graft.attaching.parameters import after_step, lr_factors, parameters, penalty
from graft.attaching.saving import training_state
from graft.injection.state import state_of
from tests.contract.table import Row, base, ids, logits, loss, randomise, rows


class Same(Composite):
    """Compute what the inner kind computes."""

    kind: Literal["same"] = "same"

    @property
    def folds(self) -> bool:
        return self.of.folds

    def build(self, spec: SiteSpec) -> Adapter:
        return wrap(spec, self.of.build(spec))


@pytest.fixture(autouse=True)
def known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(registry._registered, "same", Same)


def both(row: Row) -> tuple[Any, Any]:
    """The row's adapter as it is and with an identity composite around each part, from the same random numbers."""
    parts = [Same(of=part) for part in row.config.parts()]
    models = []
    for config in (row.config, parts[0] if len(parts) == 1 else graft.Stack(adapters=tuple(parts))):
        model = base(row.family)
        torch.manual_seed(3)
        graft.attach(model, {"a": config})
        models.append(model)
    return models[0], models[1]


def plain(name: str) -> str:
    """A tensor's name without the composites."""
    return ".".join(part for part in name.split(".") if part != "of")


def same_tensors(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    found, wanted = ({plain(name): tensor for name, tensor in each.items()} for each in (found, wanted))
    assert set(found) == set(wanted)
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)


@rows()
def test_an_identity_composite_is_the_bare_kind(row: Row, tmp_path: Path) -> None:
    bare, around = both(row)
    same_tensors(training_state(around, "a"), training_state(bare, "a"))
    assert graft.summary(around).adapter_parameters == graft.summary(bare).adapter_parameters
    rates = ({plain(name): rate for name, rate in lr_factors(model, "a").items()} for model in (around, bare))
    assert next(rates) == next(rates)
    for model in (bare, around):
        randomise(model, "a")
    with torch.no_grad():
        assert torch.equal(logits(around, ids()), logits(bare, ids()))
    gradients = [trained(model) for model in (bare, around)]
    same_tensors(gradients[1], gradients[0])
    same_tensors(training_state(around, "a"), training_state(bare, "a"))  # AdaLoRA masks ranks after a step
    for model, name in ((bare, "bare"), (around, "around")):
        graft.save(model, "a", tmp_path / name)
    files = [load_file(tmp_path / name / "adapter_model.safetensors") for name in ("around", "bare")]
    same_tensors(*files)
    fresh = base(row.family)
    graft.load(fresh, tmp_path / "around", name="a")
    with torch.no_grad():
        assert torch.equal(logits(fresh, ids()), logits(around.eval(), ids()))


def trained(model: Any) -> dict[str, Tensor]:
    """The gradients of one step in training, with the same dropout for both models; the kind then acts after the step."""
    model.train()
    torch.manual_seed(5)
    total, extra = loss(model, ids()), penalty(model, "a")
    (total if extra is None else total + extra).backward()
    found = {name: p.grad for name, p in parameters(model, "a") if p.grad is not None}
    after_step(model, "a", 1, 1000)
    return found


@rows(where=lambda row: row.config.folds)
def test_an_identity_composite_merges_as_the_bare_kind(row: Row) -> None:
    bare, around = both(row)
    found = []
    for model in (bare, around):
        randomise(model, "a")
        try:
            graft.merge(model, "a")
        except graft.GraftError as error:
            found.append(str(error))
            continue
        with torch.no_grad():
            found.append(logits(model, ids()))
    assert found[0] == found[1] if isinstance(found[0], str) else torch.equal(found[0], found[1])


def test_sites_are_given_once() -> None:
    assert Same(of={"kind": "lora"}).sites == "linear"
    assert Same(of={"kind": "lora"}, sites="attn.q").of.sites == "attn.q"
    assert Same(of={"kind": "lora", "sites": "attn.q"}).sites == "attn.q"
    with pytest.raises(graft.GraftError, match="sites are given twice"):
        Same(of={"kind": "lora", "sites": "attn.q"}, sites="attn.v")


@pytest.mark.parametrize("given, said", [("llm-adapters/lora", "a preset"), (["lora", "ia3"], "a list of adapters")])
def test_an_inner_adapter_is_one(given: Any, said: str) -> None:
    with pytest.raises(graft.GraftError, match=f"`of` takes one adapter, but it is {said}"):
        Same(of=given)


def test_what_an_inner_kind_needs_is_needed_around_it() -> None:
    adalora = graft.AdaLoRA(init_rank=4, target_rank=2)
    assert Same(of=adalora).needs_gradients and graft.Sum(of=[adalora, "lora"], sites="attn.q").needs_gradients
    assert graft.Stack(adapters=(adalora, graft.LoRA())).needs_gradients
    with pytest.raises(graft.GraftError, match="changes its ranks by its gradients"):
        graft.Mixture(of=Same(of=adalora))


def test_a_composite_in_a_composite() -> None:
    model = base("llama")
    graft.attach(model, {"a": Same(of=Same(of=graft.LoRA(rank=2, lr_ratio=8.0, sites="attn.q")))})
    assert sorted(set(lr_factors(model, "a").values())) == [1.0, 8.0]
    assert state_of(model).adapter("a").config.model_dump()["of"]["of"]["lr_ratio"] == 8.0

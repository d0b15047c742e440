"""Two models may share one config object: what attention the one runs is no business of the other."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from transformers import AutoConfig, LlamaForCausalLM

import graft
from graft.injection.config_view import ConfigView
from tests.families.zoo import MODERN, TABLE, batch, tiny


def _pair() -> tuple[Any, Any]:
    config = AutoConfig.for_model("llama", **MODERN)
    torch.manual_seed(1)
    one, other = LlamaForCausalLM(config).eval(), LlamaForCausalLM(config).eval()
    assert one.config is other.config
    return one, other


def test_a_prefix_on_one_model_leaves_the_other_and_their_config_alone() -> None:
    one, other = _pair()
    inputs, backend, described = batch(), one.config._attn_implementation, one.config.to_dict()
    with torch.no_grad():
        before = other(**inputs).logits
        graft.attach(one, {"p": graft.Prefix(tokens=3, init_std=1.0)})
        assert torch.equal(other(**inputs).logits, before)
        assert other.config is one.config
        assert (one.config._attn_implementation, one.config.to_dict()) == (backend, described)
        graft.attach(other, {"p": graft.Prefix(tokens=2, init_std=1.0)})
        graft.detach(one)
        assert not torch.equal(other(**inputs).logits, before)
        graft.detach(other)
        assert torch.equal(other(**inputs).logits, before)


def test_changing_the_backend_of_a_grafted_model_is_followed() -> None:
    model = tiny("llama", "sdpa")
    graft.attach(model, {"p": graft.Prefix(tokens=3, init_std=1.0)})
    with torch.no_grad():
        before = model(**batch(), output_attentions=False).logits
        model.set_attn_implementation("eager")
        after = model(**batch(), output_attentions=True)
    assert (after.logits - before)[batch()["attention_mask"].bool()].abs().max() < 1e-5
    assert after.attentions[0].shape == (3, 4, 9, 9)
    assert not after.attentions[0][batch()["attention_mask"].bool().all(1)].sum(-1).allclose(torch.ones(1))


def test_a_view_shares_every_other_attribute_and_survives_copying() -> None:
    model = tiny("llama")
    graft.attach(model, {"p": graft.Prefix(tokens=3)})
    view = model.model.layers[0].self_attn.config
    assert isinstance(view, ConfigView) and isinstance(view, type(model.config))
    assert view.hidden_size == 32
    model.config.rms_norm_eps = 0.5
    assert view.rms_norm_eps == 0.5
    for again in (copy.deepcopy(view), pickle.loads(pickle.dumps(view))):
        assert isinstance(again, ConfigView) and again.hidden_size == 32


@pytest.mark.parametrize("family", TABLE)
def test_detaching_a_prefix_gives_every_class_and_config_back(family: str) -> None:
    model = tiny(family)
    with torch.no_grad():
        before = model(**batch()).logits
    classes = [type(module) for module in model.modules()]
    dicts = [set(module.__dict__) for module in model.modules()]
    graft.attach(model, {"p": graft.Prefix(tokens=3, positions="after_prefix")})
    graft.detach(model)
    assert [type(module) for module in model.modules()] == classes
    assert [set(module.__dict__) for module in model.modules()] == dicts
    assert not any(isinstance(getattr(module, "config", None), ConfigView) for module in model.modules())
    with torch.no_grad():
        assert torch.equal(model(**batch()).logits, before)

"""Class substitution: the model stays itself, and pickle, deepcopy and torch.save take it along with its adapters."""

from __future__ import annotations

import copy
import inspect
import io
import pickle
from typing import Any

import pytest
import torch
from torch import nn

import graft
from graft.injection.substitution import Substituted
from tests.contract.table import Row, attached, base, base_tensors, ids, logits, pristine, rows

KINDS = "llama-lora llama-parallel-mlp llama-prefix-projection llama-mam bloom-prefix-after gptj-prefix gpt2-lora-fused bloom-series-layer"


def through_pickle(model: nn.Module) -> Any:
    return pickle.loads(pickle.dumps(model))


def through_torch_save(model: nn.Module) -> Any:
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


@rows(KINDS)
@pytest.mark.parametrize("way", [through_pickle, through_torch_save, copy.deepcopy])
def test_a_copy_computes_the_same_and_lives_on_its_own(row: Row, way: Any) -> None:
    model = attached(row, None, torch.float32, "a", "b")
    twin, inputs = way(model), ids()
    assert graft.names(twin) == ("a", "b")
    for name in ("a", "b", None):
        with graft.use(model, name), graft.use(twin, name):
            assert torch.equal(logits(twin, inputs), logits(model, inputs))
    before = logits(model, inputs)
    graft.detach(twin, "a")
    graft.set_active(twin, "b")
    assert graft.names(model) == ("a", "b") and torch.equal(logits(model, inputs), before)


@rows(KINDS)
def test_the_model_stays_an_instance_of_its_class_with_its_names(row: Row) -> None:
    model, plain = attached(row), pristine(row.family)
    changed = 0
    for path, module in plain.named_modules():
        ours = model.get_submodule(path)
        assert isinstance(ours, type(module))
        assert (type(ours).__name__, type(ours).__module__) == (type(module).__name__, type(module).__module__)
        assert list(inspect.signature(type(ours).forward).parameters) == list(
            inspect.signature(type(module).forward).parameters
        )
        changed += isinstance(ours, Substituted)
    assert changed and [name for name, _ in base_tensors(model)] == list(plain.state_dict())


@rows(KINDS)
def test_the_last_detach_gives_every_module_its_class_back(row: Row) -> None:
    model, plain = attached(row, None, torch.float32, "a", "b"), pristine(row.family)
    graft.detach(model, "a")
    graft.detach(model)
    for path, module in plain.named_modules():
        ours = model.get_submodule(path)
        assert type(ours) is type(module)
        assert set(ours.__dict__) == set(module.__dict__), path
        assert list(ours._modules) == list(module._modules)
    assert model.model.config is model.config if row.family == "llama" else True
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert torch.equal(logits(model, ids()), logits(plain, ids()))


def test_two_models_that_share_a_config_do_not_touch_each_other() -> None:
    one = base("llama")
    other = type(one)(one.config).eval()
    expected = logits(other, ids())
    graft.attach(one, {"a": graft.Prefix(tokens=2)})
    assert one.config is other.config and other.config._attn_implementation == "sdpa"
    assert torch.equal(logits(other, ids()), expected)


def test_frozen_parameters_are_given_their_requires_grad_back() -> None:
    model = base("llama")
    model.lm_head.weight.requires_grad_(False)
    graft.attach(model, {"a": graft.LoRA(rank=2)})
    assert not any(parameter.requires_grad for name, parameter in model.named_parameters() if "graft" not in name)
    graft.detach(model)
    assert [name for name, parameter in model.named_parameters() if not parameter.requires_grad] == ["lm_head.weight"]


def test_a_model_wrapped_by_peft_is_refused() -> None:
    peft = pytest.importorskip("peft")
    model = base("llama")
    wrapped = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"]))
    for each in (wrapped, model):
        with pytest.raises(graft.GraftError, match="already wrapped by PEFT"):
            graft.attach(each, {"a": graft.LoRA(rank=2)})


def test_detach_refuses_a_module_that_was_wrapped_since() -> None:
    model = base("llama")
    graft.attach(model, {"a": graft.LoRA(rank=2, sites="mlp.down")})
    layer = model.model.layers[0].mlp.down_proj
    layer.__class__ = type("Wrapped", (type(layer),), {})
    with pytest.raises(graft.GraftError, match="wrapped by other code after attach"):
        graft.detach(model)

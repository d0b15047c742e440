"""A forward of ours that the installed transformers has outgrown is found out at attach, by an error that says what still works."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

import graft
from graft.architectures.walk import own_class
from graft.attention import flat_attention
from graft.attention.install import OWN_FORWARDS, install, uninstall
from graft.attention.own_forward import OwnForward
from graft.injection.config_view import ConfigView
from graft.injection.state import State
from tests.families.zoo import tiny

IDS = torch.tensor([[5, 9, 11, 7]])
SAID = rf"of transformers {transformers.__version__} is not what this release of Graft knows.*lora.*padded batches"


def _outgrown(model: Any, change: Any) -> Any:
    """The model with another release of its attention: a class of the same name, whose forward is `change` of the old."""
    for module in model.modules():
        cls = type(module)
        if cls.__name__ in {name for _, name in OWN_FORWARDS}:
            forward = functools.wraps(cls.forward)(change(cls.forward))
            module.__class__ = type(cls.__name__, (cls,), {"forward": forward, "__module__": cls.__module__})
    return model


def _moved(forward: Any) -> Any:
    """The output layer is elsewhere now, and its old name is gone."""

    def changed(self: Any, *args: Any, **kwargs: Any) -> Any:
        self._modules["dense"] = self.__dict__["elsewhere"][0]
        try:
            return forward(self, *args, **kwargs)
        finally:
            del self._modules["dense"]

    return changed


def _sharper(forward: Any) -> Any:
    """The scores are another function of queries and keys, and every name is as it was."""

    def changed(self: Any, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        return forward(self, hidden_states * 1.001, *args, **kwargs)

    return changed


def _without_dense(family: str) -> Any:
    model = _outgrown(tiny(family), _moved)
    for block in model.transformer.h:
        block.self_attention.__dict__["elsewhere"] = (block.self_attention._modules.pop("dense"),)
    return model


@pytest.mark.parametrize(
    ("family", "kind"), [("bloom", graft.Prefix(tokens=2)), ("falcon", graft.PromptTuning(tokens=2))]
)
def test_a_forward_that_fails_is_refused_and_the_model_is_as_before(family: str, kind: Any) -> None:
    model, said = _without_dense(family), f"Attention {SAID}".replace("knows", "knows.*AttributeError.*dense")
    classes = [type(module) for module in model.modules()]
    with torch.no_grad():
        before = model(IDS).logits
        with pytest.raises(graft.GraftError, match=said):
            graft.attach(model, {"p": kind})
        assert [type(module) for module in model.modules()] == classes and graft.names(model) == ()
        assert torch.equal(model(IDS).logits, before)
        graft.attach(model, {"a": graft.LoRA(rank=2, sites="attn.qkv")})  # what the error says still works
        assert torch.equal(model(IDS).logits, before)
        with pytest.raises(graft.GraftError, match=said), flat_attention(model):
            pass
        assert torch.equal(model(IDS).logits, before)


@pytest.mark.parametrize("family", ["bloom", "falcon", "falcon-mq", "falcon-mha", "deberta", "deberta-v2"])
def test_a_forward_that_computes_something_else_is_refused(family: str) -> None:
    with pytest.raises(graft.GraftError, match=SAID.replace("knows", "knows.* off ")):
        graft.attach(_outgrown(tiny(family), _sharper), {"p": graft.Prefix(tokens=2)})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("family", ["bloom", "falcon", "falcon-mq", "falcon-mha", "gptj", "deberta", "deberta-v2"])
def test_each_class_is_proved_once(family: str, dtype: torch.dtype) -> None:
    model = tiny(family).to(dtype)
    ours = {
        own_class(m)
        for m in model.modules()
        if (type(m).__module__.rpartition(".modeling_")[2], type(m).__name__) in OWN_FORWARDS
    }
    graft.attach(model, {"p": graft.Prefix(tokens=2)})
    used = {own_class(module) for module in model.modules() if isinstance(module, OwnForward)}
    assert model.graft_state.proved_forwards == used <= ours


class GPTJAttention(nn.Module):
    """The shape of GPT-J's attention from transformers 5.24 on: no table of positions, and the interface is called."""

    def __init__(self) -> None:
        super().__init__()
        self.config = transformers.GPTJConfig()

    def forward(self, hidden_states: Tensor, position_embeddings: Any, cache: Any = None, **kwargs: Any) -> Any:
        from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

        function = ALL_ATTENTION_FUNCTIONS[self.config._attn_implementation]
        return function(self, hidden_states, hidden_states, hidden_states, None, **kwargs)


def test_a_module_that_calls_the_interface_needs_no_forward_of_ours() -> None:
    module = GPTJAttention()
    type(module).__module__ = "transformers.models.gptj.modeling_gptj"
    config = module.config
    install(module, State(), "h.0.attn")
    assert isinstance(module.config, ConfigView) and type(module) is GPTJAttention
    uninstall(module, "h.0.attn")
    assert module.config is config

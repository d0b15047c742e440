"""Token by token equals all at once without mask and position ids, under the name that the release has for the cache and under the other.

transformers calls the cache `past_key_values` up to 5.23 and `cache` from 5.24 on. Whichever is installed, a model whose forwards have the
other name is made here by a subclass, so that both are tried everywhere.
"""

from __future__ import annotations

import functools
import inspect
from typing import Any

import pytest
import torch

import graft
from graft.injection.arguments import CACHE_NAMES, cache_name
from tests.small import small_model

IDS = torch.tensor([[5, 9, 11, 7, 8, 20, 13]])
KINDS = {
    "reft": lambda: graft.ReFT(rank=2, sites="layer"),
    "prompt": lambda: graft.PromptTuning(tokens=4),
    "p_tuning": lambda: graft.PTuning(tokens=4),
    "prefix": lambda: graft.Prefix(tokens=3, positions="after_prefix", init_std=1.0),
}


def _with_name(cls: type, name: str) -> type:
    """The class with another name for the cache in the signature of its forward."""
    own = str(cache_name(cls.forward))  # pyright: ignore[reportAttributeAccessIssue]

    @functools.wraps(cls.forward)  # pyright: ignore[reportAttributeAccessIssue]
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        given = {own if key in CACHE_NAMES else key: value for key, value in kwargs.items()}
        return cls.forward(self, *args, **given)  # pyright: ignore[reportAttributeAccessIssue]

    signature = inspect.signature(cls.forward)  # pyright: ignore[reportAttributeAccessIssue]
    changed = [each.replace(name=name) if each.name == own else each for each in signature.parameters.values()]
    forward.__signature__ = signature.replace(parameters=changed)  # pyright: ignore[reportAttributeAccessIssue]
    return type(cls.__name__, (cls,), {"forward": forward, "__module__": cls.__module__})


def _model(name: str) -> Any:
    model = small_model("llama")
    for module in (model, model.model):
        module.__class__ = _with_name(type(module), name)
    model.generation_config.eos_token_id = None
    return model


@pytest.mark.parametrize("name", CACHE_NAMES[:2])
@pytest.mark.parametrize("kind", KINDS)
def test_token_by_token_equals_all_at_once(kind: str, name: str) -> None:
    model = _model(name)
    assert cache_name(model.forward) == name
    graft.attach(model, {"a": KINDS[kind]()})
    with torch.no_grad():
        for _, parameter in graft.parameters(model, "a"):
            parameter.add_(torch.randn_like(parameter) * 0.4)
        whole, cache, parts = model(input_ids=IDS, use_cache=False).logits, None, []
        for start, stop in ((0, 4), (4, 5), (5, 7)):
            out = model(input_ids=IDS[:, start:stop], use_cache=True, **{name: cache})
            parts.append(out.logits)
            cache = next(out[each] for each in CACHE_NAMES if each in out)
    torch.testing.assert_close(torch.cat(parts, 1), whole, atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_generate_with_a_cache_writes_what_it_writes_without(kind: str) -> None:
    model = small_model("llama")
    model.generation_config.eos_token_id = None
    graft.attach(model, {"a": KINDS[kind]()})
    start, slow = IDS[:, :4], IDS[:, :4]
    with torch.no_grad():
        for _, parameter in graft.parameters(model, "a"):
            parameter.add_(torch.randn_like(parameter) * 0.4)
        fast = model.generate(start, attention_mask=torch.ones_like(start), max_new_tokens=6, do_sample=False)
        for _ in range(6):
            token = model(input_ids=slow, use_cache=False).logits[:, -1:].argmax(-1)
            slow = torch.cat([slow, token], 1)
    assert fast.tolist() == slow.tolist()

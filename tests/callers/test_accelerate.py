"""accelerate's offload hooks replace a module's forward on its instance: adapters act all the same, or Graft refuses."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from accelerate import cpu_offload
from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_submodules

import graft
from tests.callers.tiny import rows, tiny_llama

IDS = torch.tensor([row["input_ids"] for row in rows(2)])


def expected() -> torch.Tensor:
    model = tiny_llama()
    torch.manual_seed(5)
    graft.attach(model, {"a": graft.Series(sites="mlp attn", init="bert"), "b": graft.LoRA(rank=4, sites="linear")})
    with graft.use(model, "a"), torch.no_grad():
        return model(IDS).logits


def attach_both(model: torch.nn.Module) -> None:
    torch.manual_seed(5)
    graft.attach(model, {"a": graft.Series(sites="mlp attn", init="bert"), "b": graft.LoRA(rank=4, sites="linear")})


def test_an_offloaded_model_takes_adapters_that_act() -> None:
    model = tiny_llama()
    cpu_offload(model, execution_device=torch.device("cpu"))
    attach_both(model)
    with graft.use(model, "a"), torch.no_grad():
        torch.testing.assert_close(model(IDS).logits, expected())


def test_a_model_offloaded_after_attach_is_refused_with_the_way_out() -> None:
    model = tiny_llama()
    attach_both(model)
    cpu_offload(model, execution_device=torch.device("cpu"))
    with graft.use(model, "b"), torch.no_grad(), pytest.raises(graft.GraftError, match="offload the base first"):
        model(IDS)
    with graft.use(model, "a"), torch.no_grad():  # its layers are modules of their own, which the hooks bring back
        torch.testing.assert_close(model(IDS).logits, expected())


def test_detach_refuses_while_a_later_hook_is_in_place() -> None:
    model = tiny_llama()
    attach_both(model)
    cpu_offload(model, execution_device=torch.device("cpu"))
    with pytest.raises(graft.GraftError, match="hooked after attach"):
        graft.detach(model)
    remove_hook_from_submodules(model)
    graft.detach(model)
    assert type(model.model.layers[0].mlp.down_proj) is torch.nn.Linear


def test_a_hook_from_before_attach_outlives_detach() -> None:
    model, seen = tiny_llama(), []

    class Sees(ModelHook):
        def pre_forward(self, module: torch.nn.Module, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
            seen.append(module)
            return args, kwargs

    layer = model.model.layers[0]
    hosts = [layer.self_attn.q_proj, layer.mlp.down_proj, layer.mlp]
    for host in hosts:
        add_hook_to_module(host, Sees())
    attach_both(model)
    graft.detach(model)
    seen.clear()
    with torch.no_grad():
        model(IDS)
    assert set(seen) == set(hosts)

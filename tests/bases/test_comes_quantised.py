"""Checkpoints that come quantised by other libraries: what Graft makes of them, and what it says of those that it cannot use."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import graft
from graft.attaching.active import running, set_trainable
from graft.attaching.fingerprint import fingerprint
from graft.bases import load_model
from graft.bases.dequantising import dequantise
from graft.bases.quantised import quantised
from graft.config.base import BaseConfig
from graft.errors import GraftError
from graft.routing.context import ForwardContext
from graft.testing.case import randomise
from graft.training.forward.packed import refuse_without_gradients
from tests.small import save_small, small_model

IDS = torch.arange(2, 14).view(2, 6)


def config(folder: Path, **changes: Any) -> BaseConfig:
    return BaseConfig.model_validate({"model": str(folder), "device": "cpu", "dtype": "float32", **changes})


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_small(tmp_path_factory.mktemp("bases") / "llama", hidden_size=64, intermediate_size=128)


def said_to_be(folder: Path, place: Path, how: dict[str, Any]) -> Path:
    """A copy of a checkpoint whose config says how its weights are quantised."""
    place.mkdir()
    for each in folder.iterdir():
        (place / each.name).write_bytes(each.read_bytes())
    settings = json.loads((place / "config.json").read_text())
    (place / "config.json").write_text(json.dumps({**settings, "quantization_config": how}))
    return place


def saved_by_torchao(folder: Path, place: Path, setting: str, **options: Any) -> Path:
    torchao: Any = pytest.importorskip("torchao.quantization", reason="needs torchao, which Graft does not install")
    from transformers import AutoModelForCausalLM, TorchAoConfig

    how = TorchAoConfig(getattr(torchao, setting)(**options))
    AutoModelForCausalLM.from_pretrained(folder, quantization_config=how, dtype=torch.float32).save_pretrained(place)
    return place


def gradients(model: Any, kind: Any) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    graft.attach(model, {"a": kind})
    randomise(model, "a")
    model(IDS, use_cache=False).logits.square().mean().backward()
    return {name: p.grad for name, p in graft.parameters(model, "a") if p.grad is not None}


def test_torchao_s_weights_are_dequantised(folder: Path, tmp_path: Path) -> None:
    model = load_model(config(saved_by_torchao(folder, tmp_path, "Int8WeightOnlyConfig")))
    found = quantised(model)
    assert found is not None and found.method == "torchao (Int8Tensor)" and found.reads and 8 < found.bits < 10
    graft.attach(model, {"a": graft.DoRA(rank=2, sites="linear"), "b": graft.LoRA(rank=2)})
    assert "unknown" not in fingerprint(model)["digest"]
    set_trainable(model, ["a", "b"])
    with running(model, ForwardContext(("a", "b"), (6, 6), False, (3, 4))):
        model(IDS, use_cache=False).logits.square().mean().backward()
    assert all(p.grad is not None for name in "ab" for _, p in graft.parameters(model, name))


@pytest.mark.parametrize(
    "setting",
    ["Int8WeightOnlyConfig", "Int8DynamicActivationInt8WeightConfig", "Int8DynamicActivationIntxWeightConfig"],
)
def test_adapters_on_torchao_train_as_on_its_weights(folder: Path, tmp_path: Path, setting: str) -> None:
    """Also where torchao itself rounds the input, and passes no gradient to it."""
    place = saved_by_torchao(folder, tmp_path, setting)
    for kind in (graft.LoRA(rank=2, sites="linear"), graft.DoRA(rank=2, sites="linear")):
        model, plain = load_model(config(place)), load_model(config(place))
        dequantise(plain, torch.float32)
        assert quantised(plain) is None
        found, wanted = (gradients(each, kind) for each in (model, plain))
        for name, grad in wanted.items():
            torch.testing.assert_close(found[name], grad, rtol=1e-3, atol=1e-4 * float(grad.abs().max()))
        refuse_without_gradients(model)


def test_a_model_with_rounded_inputs_rounds_them_again_when_it_is_bare(folder: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    place = saved_by_torchao(folder, tmp_path, "Int8DynamicActivationInt8WeightConfig")
    model = AutoModelForCausalLM.from_pretrained(place, dtype=torch.float32)
    before = model(IDS).logits
    with pytest.raises(GraftError, match=r"torchao \(Int8Tensor\) pass no gradient to their input"):
        refuse_without_gradients(model)
    graft.attach(model, {"a": graft.LoRA(rank=2)})
    refuse_without_gradients(model)
    graft.detach(model)
    torch.testing.assert_close(model(IDS).logits, before, rtol=0, atol=0)


class ForInference(nn.Module):
    """A layer with packed weights and a kernel that autograd does not know."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.out_features, self.in_features = layer.weight.shape
        self.register_buffer("qweight", (layer.weight.data * 16).to(torch.int32))

    @torch.no_grad()
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.qweight.to(x.dtype) / 16)


def test_layers_without_gradients_are_named_before_they_train() -> None:
    model = small_model()
    refuse_without_gradients(model)
    model.model.layers[1].mlp.up_proj = ForInference(model.model.layers[1].mlp.up_proj)
    with pytest.raises(GraftError, match=r"ForInference pass no gradient .*'model.layers.1.mlp.up_proj'"):
        refuse_without_gradients(model)


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ({"quant_method": "gptq", "bits": 4, "group_size": 64}, "needs a package that is not installed: .*optimum"),
        ({"quant_method": "awq", "bits": 4, "group_size": 64}, "needs a package that is not installed: .*gptqmodel"),
        (
            {"quant_method": "exl2"},
            "quantised by 'exl2', which the installed transformers cannot read; it reads .*torchao",
        ),
        ({"bits": 4}, "quantization_config without a quant_method"),
    ],
)
def test_what_cannot_be_read_is_named(folder: Path, tmp_path: Path, how: dict[str, Any], said: str) -> None:
    if how.get("quant_method") in ("gptq", "awq") and find_spec("gptqmodel"):
        pytest.skip("its package is installed")
    with pytest.raises(GraftError, match=said):
        load_model(config(said_to_be(folder, tmp_path / "given", how)))


def test_a_skip_that_leaves_nothing_to_quantise_is_named(folder: Path) -> None:
    pytest.importorskip("bitsandbytes")
    with pytest.raises(GraftError, match="nothing of .* would be in nf4, because base.skip names all"):
        load_model(config(folder, quantize="nf4", skip="linear head"))

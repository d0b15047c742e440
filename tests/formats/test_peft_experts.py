"""PEFT's LoRAs on parameters (`target_parameters`): read, written, and computed by PEFT itself."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import graft
from graft.attaching.parameters import tensors
from graft.injection.state import state_of
from tests.architectures import build

pytestmark = pytest.mark.filterwarnings("ignore:The following .*_pattern keys")  # PEFT does not look among parameters
FAMILIES = ("mixtral", "qwen2_moe", "qwen3_moe", "gpt_oss", "llama4_text")
"""gpt_oss stores [E, I, O] and says so, llama4_text does not say so."""
EXPERTS = graft.LoRA(rank=2, alpha=6, sites="experts.gate_up experts.down")
SPECS = {
    "both": EXPERTS,
    "down": graft.LoRA(rank=2, alpha=6, rslora=True, sites="experts.down"),
    "one-layer": graft.LoRA(rank=2, sites="experts.gate_up@1 experts.down@0,1"),
    "beside-attention": graft.LoRA(
        rank=2, alpha=6, sites="attn.q experts.gate_up experts.down",
        rank_pattern={"experts.down": 3, "attn.q": 1}, alpha_pattern={r"layers\.1\.mlp\.experts\.gate_up": 5},
    ),
}  # fmt: skip


def _model(family: str) -> Any:
    model = build(family).requires_grad_(False)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(6.0)
    return model


def _logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model(input_ids=(torch.arange(24) * 7 % 59 + 3).view(3, 8), use_cache=False).logits


def _exported(family: str, spec: Any, folder: Path) -> Any:
    model = _model(family)
    graft.attach(model, {"a": spec})
    generator = torch.Generator().manual_seed(0)
    for _, parameter in graft.parameters(model, "a"):
        parameter.data.normal_(std=0.3, generator=generator)
    graft.export(model, "a", folder)
    return model


def _same(model: Any, other: Any) -> None:
    one, two = (dict(tensors(each, state_of(each), "a")) for each in (model, other))
    assert one.keys() == two.keys() and all(torch.equal(tensor, two[key]) for key, tensor in one.items())


def _close(one: Tensor, other: Tensor) -> None:
    assert (one - other).abs().max() < 1e-4 * other.abs().max().clamp(min=1.0)


@pytest.mark.parametrize(
    ("family", "spec"), [*((family, "both") for family in FAMILIES), *(("mixtral", s) for s in SPECS)]
)
def test_peft_computes_the_same_and_every_tensor_comes_back(family: str, spec: str, tmp_path: Path) -> None:
    model = _exported(family, SPECS[spec], tmp_path / "peft")
    theirs = peft.PeftModel.from_pretrained(_model(family), tmp_path / "peft").eval()
    bare = _logits(_model(family))
    assert (_logits(model) - bare).abs().max() > 1e-2
    _close(_logits(theirs), _logits(model))
    again = graft.load(_model(family), tmp_path / "peft", name="a")
    _same(model, again)
    assert torch.equal(_logits(again), _logits(model))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("names", [("experts.gate_up_proj", "experts.down_proj"), ("experts.down_proj",)])
def test_what_peft_wrote_computes_the_same(family: str, names: tuple[str, ...], tmp_path: Path) -> None:
    torch.manual_seed(0)
    settings = peft.LoraConfig(
        r=3, lora_alpha=5, target_modules=["q_proj"], target_parameters=list(names), init_lora_weights=False
    )
    theirs = peft.get_peft_model(_model(family), settings).eval()
    theirs.save_pretrained(tmp_path / "peft")
    mine = graft.load(_model(family), tmp_path / "peft", name="a")
    _close(_logits(mine), _logits(theirs))


def test_the_weight_of_a_linear_layer_named_as_a_parameter_is_a_lora_there(tmp_path: Path) -> None:
    torch.manual_seed(0)
    settings = peft.LoraConfig(r=3, target_modules=[], target_parameters=["q_proj.weight"], init_lora_weights=False)
    theirs = peft.get_peft_model(_model("mixtral"), settings).eval()
    theirs.save_pretrained(tmp_path / "peft")
    _close(_logits(graft.load(_model("mixtral"), tmp_path / "peft", name="a")), _logits(theirs))


@pytest.mark.parametrize("family", ["mixtral", "qwen2_moe"])
@pytest.mark.parametrize("version", ["0.18.1", None])
def test_the_layout_of_peft_up_to_0_18_is_told_by_shape_and_where_sizes_are_equal_by_version(
    family: str, version: str | None, tmp_path: Path
) -> None:
    """There D_e = sum over r of B[o, r E + e] A[e R + r, i] is laid down as [i, o] whatever the module says."""
    rank, generator = 2, torch.Generator().manual_seed(0)
    base, folder, stored = _model(family), tmp_path / "old", {}
    shapes: dict[str, tuple[int, ...]] = {}
    for name, parameter in base.named_parameters():
        if name.endswith("experts.gate_up_proj"):  # [4, 96, 32] of mixtral; [4, 32, 32] of qwen2_moe
            experts, first, second = shapes[name] = tuple(parameter.shape)
            A = torch.randn(experts * rank, first, generator=generator) * 0.3
            B = torch.randn(second, rank * experts, generator=generator) * 0.3
            delta = torch.einsum("ore,eri->eio", B.view(second, rank, experts), A.view(experts, rank, first))
            path = name.rpartition(".")[0]
            stored |= {f"base_model.model.{path}.lora_A.weight": A, f"base_model.model.{path}.lora_B.weight": B}
            parameter.data.add_(2.0 * delta)
    folder.mkdir()
    save_file(stored, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": 4, "target_modules": [], "peft_version": version,
              "target_parameters": ["experts.gate_up_proj"]}  # fmt: skip
    (folder / "adapter_config.json").write_text(json.dumps(config))
    assert len({shape[1] == shape[2] for shape in shapes.values()}) == 1
    _close(_logits(graft.load(_model(family), folder, name="a")), _logits(base))


@pytest.mark.parametrize(
    ("names", "reason"),
    [
        (["experts.gate_up"], "'experts.gate_up' is not in this base"),
        (["mlp.gate.weight"], "is not a weight of a linear layer or of experts"),
    ],
)
def test_parameters_without_a_site_are_named(names: list[str], reason: str, tmp_path: Path) -> None:
    _exported("mixtral", EXPERTS, tmp_path / "peft")
    path = tmp_path / "peft" / "adapter_config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, "target_parameters": names}))
    model = _model("mixtral")
    with pytest.raises(graft.GraftError, match=reason):
        graft.load(model, tmp_path / "peft", name="a")
    assert not graft.names(model)


def test_missing_and_misshapen_tensors_are_errors(tmp_path: Path) -> None:
    _exported("mixtral", EXPERTS, tmp_path / "peft")
    path = tmp_path / "peft" / "adapter_model.safetensors"
    whole = load_file(path)
    first = next(name for name in whole if name.endswith("experts.base_layer.lora_A.weight"))
    save_file({name: tensor for name, tensor in whole.items() if name != first}, path)
    with pytest.raises(graft.GraftError, match="1 missing: model.layers.0.mlp.experts.base_layer.lora_A.weight"):
        graft.load(_model("mixtral"), tmp_path / "peft", name="a")
    save_file({**whole, first: whole[first][:, :5].clone()}, path)
    with pytest.raises(graft.GraftError, match="do not fit 4 experts of 96 x 32"):
        graft.load(_model("mixtral"), tmp_path / "peft", name="a")


def test_dropout_goes_with_a_note_and_servers_are_not_given_experts(tmp_path: Path) -> None:
    model = _model("mixtral")
    graft.attach(model, {"a": EXPERTS.model_copy(update={"dropout": 0.1})})
    notes = graft.export(model, "a", tmp_path / "peft")
    assert notes == ["dropout is not written: PEFT allows none together with LoRAs on experts"]
    with pytest.raises(graft.GraftError, match="vllm ignores LoRAs on experts"):
        graft.export(model, "a", tmp_path / "served", serving="vllm")


def test_layers_that_peft_would_take_for_experts_are_refused(tmp_path: Path) -> None:
    """PEFT 0.21 renames gate_proj, up_proj and down_proj of this family to its experts, those of dense layers and shared experts too."""
    spec = graft.LoRA(rank=2, sites="mlp.gate mlp.up mlp.down")
    model = _model("deepseek_v3")
    graft.attach(model, {"a": spec})
    with pytest.raises(
        graft.GraftError, match="PEFT takes 'down_proj', 'gate_proj', 'up_proj' of deepseek_v3 for its experts"
    ):
        graft.export(model, "a", tmp_path / "peft")
    graft.export(model, "a", tmp_path / "served", serving="vllm")
    _same(model, graft.load(_model("deepseek_v3"), tmp_path / "served", name="a"))
    theirs = peft.get_peft_model(
        _model("deepseek_v3"), peft.LoraConfig(target_modules=["gate_proj", "up_proj", "down_proj"])
    )
    assert not any("shared_experts" in name and "lora" in name for name in theirs.state_dict())

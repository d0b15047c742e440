"""LoRAs on single experts, as PEFT stored them while each expert was a module, add each update to its own expert."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import (
    MixtralConfig,
    MixtralForCausalLM,
    OlmoeConfig,
    OlmoeForCausalLM,
    Qwen2MoeConfig,
    Qwen2MoeForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

import graft
from tests.formats.peft_folders import loaded, logits, off, small

OLD, NEW = ("w1", "w3", "w2"), ("gate_proj", "up_proj", "down_proj")
"""The layers of an expert by their old names: gate, up, down."""
MADE = {
    "mixtral": (small(MixtralConfig, MixtralForCausalLM, num_key_value_heads=2, num_local_experts=4), "block_sparse_moe", OLD),
    "qwen2_moe": (small(Qwen2MoeConfig, Qwen2MoeForCausalLM, num_key_value_heads=2, moe_intermediate_size=24, num_experts=4,
                        num_experts_per_tok=2, shared_expert_intermediate_size=24), "mlp", NEW),
    "qwen3_moe": (small(Qwen3MoeConfig, Qwen3MoeForCausalLM, num_key_value_heads=2, moe_intermediate_size=24, num_experts=4,
                        num_experts_per_tok=2, mlp_only_layers=[0]), "mlp", NEW),
    "olmoe": (small(OlmoeConfig, OlmoeForCausalLM, num_key_value_heads=2, num_experts=4, num_experts_per_tok=2), "mlp", NEW),
}  # fmt: skip
RANK, SCALE = 2, 4.0


@torch.no_grad()
def folder_of(name: str, targets: Sequence[str], folder: Path, **fields: Any) -> Tensor:
    """Write a folder as PEFT 0.17 did, and return the logits of the base with each update added by hand."""
    make, block, names = MADE[name]
    model: Any = make()
    generator, tensors = torch.Generator().manual_seed(0), dict[str, Tensor]()

    def update(path: str, into: int, out: int) -> Tensor:
        A, B = torch.randn(RANK, into, generator=generator) * 0.3, torch.randn(out, RANK, generator=generator) * 0.3
        tensors.update({f"base_model.model.{path}.lora_A.weight": A, f"base_model.model.{path}.lora_B.weight": B})
        return SCALE * B @ A

    modules: list[tuple[str, Any]] = list(model.named_modules())
    for path, module in modules:
        if isinstance(module, nn.Linear) and path.rpartition(".")[2] in targets:
            module.weight += update(path, module.in_features, module.out_features)
        if "gate_up_proj" not in module._parameters:
            continue
        size, gate_up, down = module.down_proj.shape[2], module.gate_up_proj, module.down_proj
        old = f"{path.removesuffix('mlp.experts')}{block}.experts"
        for expert in range(4):
            for number, own in enumerate(names):
                if own in targets and number < 2:
                    gate_up[expert, number * size : (number + 1) * size] += update(f"{old}.{expert}.{own}", 32, size)
                elif own in targets:
                    down[expert] += update(f"{old}.{expert}.{own}", size, 32)
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {
        "peft_type": "LORA",
        "r": RANK,
        "lora_alpha": 8,
        "target_modules": list(targets),
        "bias": "none",
        **fields,
    }
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return logits(model)


@pytest.mark.parametrize("name", MADE)
@pytest.mark.parametrize("chosen", [(0, 1, 2), (1,), (2,), (0, 1, 2, 3)])
def test_each_update_is_added_to_its_own_expert(name: str, chosen: tuple[int, ...], tmp_path: Path) -> None:
    make, _, names = MADE[name]
    want = folder_of(name, [(*names, "q_proj")[number] for number in chosen], tmp_path / "a")
    assert off(loaded(make(), tmp_path / "a"), want) < 1e-5


def test_experts_keep_their_scale_under_rslora_and_patterns(tmp_path: Path) -> None:
    make = MADE["mixtral"][0]
    want = folder_of("mixtral", OLD, tmp_path / "a", lora_alpha=1, alpha_pattern={"w[123]": 8})
    assert off(loaded(make(), tmp_path / "a"), want) < 1e-5
    want = folder_of("mixtral", OLD, tmp_path / "b", lora_alpha=SCALE * RANK**0.5, use_rslora=True)
    assert off(loaded(make(), tmp_path / "b"), want) < 1e-5


def test_a_missing_expert_is_named(tmp_path: Path) -> None:
    folder_of("qwen3_moe", NEW, tmp_path / "a")
    file = tmp_path / "a" / "adapter_model.safetensors"
    tensors = {name: each for name, each in load_file(file).items() if ".experts.2.up_proj." not in name}
    save_file(tensors, file)
    model = MADE["qwen3_moe"][0]()
    with pytest.raises(graft.GraftError, match=r"2 missing: model.layers.1.mlp.experts.2.up_proj.lora_A"):
        graft.load(model, tmp_path / "a")
    assert not graft.names(model)

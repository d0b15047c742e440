"""Names of tensors and modules that PEFT does not write today: with the adapter's name, of wrappers, of earlier transformers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
)

import graft
from tests.formats.peft_folders import edited, llama, loaded, logits, off, saved

WEIGHTS = "adapter_model.safetensors"


def renamed(folder: Path, change: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> None:
    save_file(change(load_file(folder / WEIGHTS)), folder / WEIGHTS)


@pytest.mark.parametrize("name", ["default", "math"])
@pytest.mark.parametrize("wrapper", ["", "module.", "_orig_mod."])
def test_the_names_of_a_state_dict_are_read(name: str, wrapper: str, tmp_path: Path) -> None:
    """As `torch.save(model.state_dict())` of what trains has them, from inside wrappers too."""
    base: Any = llama()
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "embed_tokens"], modules_to_save=["lm_head"], use_dora=True)
    config.target_modules = ["q_proj"]
    trained: Any = peft.get_peft_model(base, config, adapter_name=name).eval()
    for parameter in trained.parameters():
        if parameter.requires_grad:
            parameter.data.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)) * 0.1)
    trained.save_pretrained(tmp_path)
    raw = {f"{wrapper}{key}": each for key, each in trained.state_dict().items() if f".{name}." in key}
    folder = tmp_path if name == "default" else tmp_path / name
    save_file({key: each.clone().contiguous() for key, each in raw.items()}, folder / WEIGHTS)
    assert off(loaded(llama(), folder), logits(trained)) < 1e-5


def test_tensors_of_two_adapters_are_refused(tmp_path: Path) -> None:
    saved(llama(), peft.LoraConfig(target_modules=["q_proj"]), tmp_path / "a")
    renamed(tmp_path / "a", lambda found: {
        key.replace(".weight", f".{name}.weight"): each.clone() for key, each in found.items() for name in ("one", "two")
    })  # fmt: skip
    with pytest.raises(graft.GraftError, match=r"tensors of several adapters \(one, two\)"):
        graft.load(llama(), tmp_path / "a")


def llava() -> Any:
    torch.manual_seed(0)
    text = LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4)
    vision = CLIPVisionConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4, image_size=8, patch_size=4
    )
    kind: Any = LlavaConfig
    return LlavaForConditionalGeneration(kind(text_config=text, vision_config=vision, image_token_id=1)).eval()


def qwen2_vl() -> Any:
    torch.manual_seed(0)
    text = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
            "num_key_value_heads": 2, "rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2]}}  # fmt: skip
    vision = {"depth": 1, "embed_dim": 32, "hidden_size": 32, "num_heads": 4, "mlp_ratio": 2}
    config = Qwen2VLConfig(text_config=text, vision_config=vision, image_token_id=1, video_token_id=2)
    return Qwen2VLForConditionalGeneration(config).eval()


@pytest.mark.parametrize(
    ("make", "now", "then"),
    [(llava, "model.language_model.", "language_model.model."), (qwen2_vl, "model.language_model.", "model.")],
)
@pytest.mark.parametrize("wanted", ["names", "paths", "pattern"])
def test_paths_of_an_earlier_transformers_are_found(
    make: Any, now: str, then: str, wanted: str, tmp_path: Path
) -> None:
    want = saved(make(), peft.LoraConfig(r=2, target_modules=r".*language_model.*(q|v)_proj"), tmp_path / "a")
    renamed(tmp_path / "a", lambda found: {key.replace(now, then): each for key, each in found.items()})
    named: dict[str, Any] = {
        "names": ["q_proj", "v_proj"],
        "paths": [f"{then}layers.{layer}.self_attn.{name}_proj" for layer in (0, 1) for name in "qv"],
        "pattern": rf"{then.replace('.', '[.]')}layers.*(q|v)_proj",
    }
    more = {"exclude_modules": ".*vision.*|.*visual.*"} if wanted == "names" else {}
    assert off(loaded(make(), edited(tmp_path / "a", target_modules=named[wanted], **more)), want) < 1e-5


def test_an_adalora_may_have_pruned_a_module_whole(tmp_path: Path) -> None:
    config = peft.AdaLoraConfig(init_r=3, target_r=1, total_step=9, target_modules=["q_proj", "v_proj"], lora_alpha=8)
    model: Any = peft.get_peft_model(llama(), config)
    pattern = {
        f"model.layers.{layer}.self_attn.{name}_proj.lora_E": kept
        for layer in (0, 1)
        for name, kept in (("q", [False, False, False]), ("v", [True, False, True]))
    }
    model.peft_config["default"].rank_pattern = pattern
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if "lora_" in key:
                parameter.normal_(std=0.3, generator=torch.Generator().manual_seed(len(key)))
            if "lora_E" in key:
                kept = pattern[key.removeprefix("base_model.model.").removesuffix(".default")]
                parameter.mul_(torch.tensor(kept).float()[:, None])
    model.save_pretrained(tmp_path / "a")
    want = logits(peft.PeftModel.from_pretrained(llama(), tmp_path / "a").eval())
    assert off(loaded(llama(), tmp_path / "a"), want) < 1e-5

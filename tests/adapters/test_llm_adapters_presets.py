"""The presets of LLM-Adapters: published parameter counts on LLaMA-7B, and the modules that its commands name for BLOOM and GPT-J."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

import graft
from graft.injection.state import state_of

SIZES = {
    "llama": {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32, "vocab_size": 32000},
    "bloom": {"hidden_size": 4096, "n_layer": 30, "n_head": 32, "vocab_size": 250880},
    "gptj": {"n_embd": 4096, "n_layer": 28, "n_head": 16, "rotary_dim": 64, "vocab_size": 50400},
}  # fmt: skip
COUNTS = {
    "lora": 56_098_816,
    "series": 67_108_864,
    "adapterh": 201_326_592,
    "adapterp": 67_108_864,
    "parallel": 247_463_936,
    "prefix": 2_621_440,
}
"""Computed from the released code, and those of its README and of the DoRA paper (0.83, 0.99 and 3.54 % of the base)."""
MODULES = {
    ("bloom", "lora"): {"query_key_value", "dense_h_to_4h", "dense_4h_to_h"},
    ("bloom", "series"): {"dense_4h_to_h"},
    ("bloom", "adapterp"): {"dense_4h_to_h"},
    ("bloom", "adapterh"): {"dense_h_to_4h", "dense_4h_to_h"},
    ("bloom", "parallel"): {"dense_h_to_4h", "dense_4h_to_h"},
    ("bloom", "prefix"): {"self_attention"},
    ("gptj", "lora"): {"q_proj", "k_proj", "v_proj", "fc_in", "fc_out"},
    ("gptj", "series"): {"fc_out"},
    ("gptj", "adapterp"): {"fc_out"},
    ("gptj", "adapterh"): {"fc_in", "fc_out"},
    ("gptj", "parallel"): {"fc_in", "fc_out"},
    ("gptj", "prefix"): {"attn"},
}
"""The target modules of its `math_running_commands` and of its defaults per family."""
BEFORE = {"gate_proj", "up_proj", "dense_h_to_4h", "fc_in"}
"""Where AdapterH sits on the input of the layer."""


def _seven_billion(family: str) -> nn.Module:
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **SIZES[family]))


def _count(model: nn.Module) -> int:
    return sum(parameter.numel() for _, parameter in graft.parameters(model, "a"))


@pytest.mark.parametrize("preset", COUNTS)
def test_the_count_on_llama_7b_is_the_published_one(preset: str) -> None:
    model = _seven_billion("llama")
    assert sum(parameter.numel() for parameter in model.parameters()) == 6_738_415_616
    graft.attach(model, {"a": f"llm-adapters/{preset}"})
    assert _count(model) == COUNTS[preset]


@pytest.mark.parametrize(("family", "preset"), MODULES)
def test_bloom_and_gptj_are_adapted_where_the_published_commands_say(family: str, preset: str) -> None:
    model = _seven_billion(family)
    graft.attach(model, {"a": f"llm-adapters/{preset}"})
    installs = state_of(model).adapter("a").installs
    assert {installed.site.module.rsplit(".", 1)[-1] for installed in installs} == MODULES[family, preset]
    layers = 30 if family == "bloom" else 28
    assert len(installs) == layers * len(MODULES[family, preset])
    if preset == "adapterh":
        for installed in installs:
            before = installed.site.module.rsplit(".", 1)[-1] in BEFORE
            assert installed.config.position == ("before" if before else "after")  # pyright: ignore


@pytest.mark.parametrize(
    ("family", "preset", "count"),
    [
        ("bloom", "lora", 30 * 32 * ((4096 + 3 * 4096) + 2 * (4096 + 16384))),
        ("bloom", "parallel", 30 * 256 * 2 * (4096 + 16384)),
        ("bloom", "prefix", 10 * 30 * 2 * 4096),
        ("gptj", "series", 28 * 256 * 2 * 4096),
        ("gptj", "lora", 28 * 32 * (3 * (4096 + 4096) + 2 * (4096 + 16384))),
    ],
)
def test_counts_on_bloom_7b_and_gptj_6b_follow_from_their_sizes(family: str, preset: str, count: int) -> None:
    model = _seven_billion(family)
    graft.attach(model, {"a": f"llm-adapters/{preset}"})
    assert _count(model) == count


def test_presets_have_the_published_settings() -> None:
    model = _seven_billion("llama")
    lora = graft.attach(model, {"a": "llm-adapters/lora"}) and state_of(model).adapter("a").config
    assert (lora.rank, lora.alpha, lora.dropout) == (32, 64.0, 0.05)  # pyright: ignore
    graft.attach(model, {"b": "llm-adapters/adapterh"})
    for part in state_of(model).adapter("b").config.parts():
        assert (part.bottleneck, part.activation, part.biases, part.init, part.scale) == (
            256,
            "tanh",
            False,
            "bert",
            1.0,
        )  # pyright: ignore
    graft.attach(model, {"c": "llm-adapters/prefix"})
    prefix = state_of(model).adapter("c").config
    assert (prefix.tokens, prefix.init_std, prefix.positions) == (10, 1.0, "after_prefix")  # pyright: ignore

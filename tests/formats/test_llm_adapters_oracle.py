"""Every LLaMA, BLOOM and GPT-J checkpoint that LLM-Adapters wrote computes what LLM-Adapters computed.

The expected logits were computed by that library itself (shared/oracle/README.md); the tolerance is the one given there.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM

import graft

BLOOM_AND_GPTJ = (
    "adapterh", "adapterh-bias", "adapterp", "lora", "lora-biasonly", "lora-default", "parallel", "parallel-default", "prefix",
)  # fmt: skip
CASES = (
    *(f"{family}-{case}" for family in ("bloom", "gptj") for case in BLOOM_AND_GPTJ),
    "llama-adapterh", "llama-adapterh-learned", "llama-adapterh-relu-s", "llama-adapterh-upgate", "llama-adapterp",
    "llama-adapterp-learned", "llama-lora-default-targets", "llama-lora-qkvud", "llama-lora-qv",
    "llama-lora-regex-layers", "llama-mha-adapterh-lmhead", "llama-mha-parallel-all", "llama-mha-prefix",
    "llama-mha-prefix-proj", "llama-parallel-default", "llama-parallel-learned", "llama-parallel-mam", "llama-parallel-updown",
    "bloom-prompt", "gptj-prompt", "llama-prompt", "llama-ptuning-mlp",
)  # fmt: skip


def _base(shared: Path, folder: Path, attention: str) -> nn.Module:
    base = json.loads((folder / "meta.json").read_text())["base"]
    path = shared / "oracle" / base if base.startswith("bases/") else shared / base
    return AutoModelForCausalLM.from_pretrained(path, attn_implementation=attention, dtype=torch.float32).eval()


def _folder(shared: Path, case: str) -> Path:
    folder = shared / "oracle" / "llm-adapters" / case
    if not folder.is_dir():
        pytest.skip("the shared inputs have no reference results of LLM-Adapters")
    return folder


@pytest.mark.parametrize("case", CASES)
def test_a_checkpoint_of_llm_adapters_gives_the_logits_of_llm_adapters(shared: Path, case: str) -> None:
    folder = _folder(shared, case)
    expected = load_file(folder / "expected.safetensors")
    tolerance = max(1e-4, 1e-5 * json.loads((folder / "meta.json").read_text())["max_abs_output"])
    for attention in ("eager", "sdpa") if case.startswith("llama") else ("eager",):
        model = _base(shared, folder, attention)
        graft.load(model, folder / "checkpoint", name="theirs")
        for batch in ("unpadded", "padded"):
            inputs = {key: expected[f"{batch}.{key}"] for key in ("input_ids", "attention_mask")}
            real = inputs["attention_mask"].bool()
            with torch.no_grad():
                length = inputs["input_ids"].shape[1]  # theirs begins with the logits of virtual tokens
                difference = model(**inputs).logits - expected[f"{batch}.logits"][:, -length:]
                with graft.use(model, None):
                    base_difference = model(**inputs).logits - expected[f"{batch}.base_logits"]
            assert difference[real].abs().max() < tolerance
            assert base_difference[real].abs().max() < tolerance


def test_the_cases_are_all_there_are(shared: Path) -> None:
    found = {path.name for path in _folder(shared, "").iterdir()}
    assert found == {*CASES}

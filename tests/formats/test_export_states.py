"""What is written does not depend on the state of the model: merged, beside other adapters, quantised; and nobody's files are lost."""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import graft
from tests.contract.table import base, ids, logits, randomise, with_adapters

LORA = graft.LoRA(rank=2, sites="attn.q attn.v")
WRITTEN: dict[str, tuple[str, Any, dict[str, Any]]] = {
    "lora": ("llama", LORA, {}),
    "lora and wholes": ("llama", graft.Stack(adapters=(LORA, graft.Full(sites="norm head"))), {}),
    "lora and rows": ("llama", graft.Stack(adapters=(LORA, graft.Full(sites="embed", tokens=(3, 5)))), {}),
    "lora on slices": ("bloom", graft.LoRA(rank=2, sites="attn.q attn.v"), {}),
    "lora with bias": ("gpt2", graft.LoRA(rank=2, sites="attn.qkv", train_bias=True), {}),
    "dora": ("llama", graft.DoRA(rank=2, sites="attn.q mlp.down"), {}),
    "dora as SVD": ("llama", graft.DoRA(rank=2, sites="attn.q mlp.down"), {"svd": 4, "serving": "vllm"}),
    "ia3": ("llama", graft.IA3(), {}),
    "ia3 as SVD": ("llama", graft.IA3(), {"svd": 8}),
    "hira": ("llama", graft.HiRA(rank=2), {}),
    "oft": ("llama", graft.OFT(block_size=4), {}),
    "patterns for SGLang": ("llama", graft.LoRA(rank=2, rslora=True, rank_pattern={"attn.q": 3}), {"serving": "sglang", "convert": True}),
    "hub lora": ("bert", graft.LoRA(rank=2, sites="attn.q attn.v"), {"format": "adapterhub"}),
    "hub dora": ("llama", graft.DoRA(rank=2, sites="attn.q attn.v"), {"format": "adapterhub"}),
    "llm-adapters": ("llama", LORA, {"format": "llm-adapters"}),
}  # fmt: skip


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


@pytest.mark.parametrize("case", WRITTEN)
def test_a_folder_is_the_same_whatever_is_merged_or_attached(case: str, tmp_path: Path) -> None:
    family, spec, options = WRITTEN[case]
    other = graft.LoRA(rank=3, sites="attn.q") if family == "llama" else graft.BitFit()
    model = with_adapters(family, a=spec)
    notes = graft.export(model, "a", tmp_path / "plain", **options)
    graft.attach(model, {"b": other})
    randomise(model, "b", 5)
    graft.export(model, "a", tmp_path / "beside", **options)
    for merged in ("a", "b"):
        graft.merge(model, merged)
        before = logits(model, ids())
        assert graft.export(model, "a", tmp_path / merged, **options) == notes
        assert torch.equal(logits(model, ids()), before)
        graft.unmerge(model, merged)
    plain = contents(tmp_path / "plain")
    for folder in ("beside", "a", "b"):
        found = contents(tmp_path / folder)
        assert found.keys() == plain.keys()
        assert all(found[name] == plain[name] or name.endswith(".bin") for name in plain), folder


def test_what_was_merged_for_good_is_not_exported_from_other_weights(tmp_path: Path) -> None:
    model = with_adapters("llama", a=graft.DoRA(rank=2))
    graft.merge(model, "a", keep=False)
    with pytest.raises(graft.GraftError, match=r"merged for good \(keep=False\)"):
        graft.export(model, "a", tmp_path / "a")
    graft.save(model, "a", tmp_path / "own")  # its own tensors are whole; the base is recorded as not known
    assert json.loads((tmp_path / "own" / "adapter_config.json").read_text())["base"]["digest"] is None
    with torch.no_grad():
        expected = logits(model, ids())
    torch.testing.assert_close(logits(graft.load(base("llama"), tmp_path / "own"), ids()), expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("wanted", ["svd", "wholes", "adapterhub"])
def test_weights_that_are_no_numbers_are_not_read_as_such(wanted: str, tmp_path: Path) -> None:
    spec = (
        graft.Stack(adapters=(LORA, graft.Full(sites="attn.o")))
        if wanted == "wholes"
        else graft.DoRA(rank=2, sites="attn.q attn.v")
    )
    model = with_adapters("llama", a=spec)
    for layer in model.model.layers:
        for linear in (layer.self_attn.q_proj, layer.self_attn.v_proj, layer.self_attn.o_proj):
            linear.weight = torch.nn.Parameter(linear.weight.detach().to(torch.float8_e4m3fn), requires_grad=False)
    options: dict[str, Any] = {"svd": {"svd": 4}, "wholes": {}, "adapterhub": {"format": "adapterhub"}}[wanted]
    with pytest.raises(graft.GraftError, match="load the base in bfloat16 or float32"):
        graft.export(model, "a", tmp_path / "a", **options)


def test_sglang_scales_by_alpha_over_rank(tmp_path: Path) -> None:
    for number, spec in enumerate(
        (
            graft.LoRA(rank=4, rslora=True, sites="attn.q attn.k attn.v"),
            graft.LoRA(rank=4, alpha_pattern={"attn.k": 2}, sites="attn.q attn.k attn.v"),
        )
    ):
        model = with_adapters("llama", a=spec)
        with pytest.raises(graft.GraftError, match="sglang needs .*--convert"):
            graft.export(model, "a", tmp_path / "no", serving="sglang")
        graft.export(model, "a", tmp_path / str(number), serving="sglang", convert=True)
        config = json.loads((tmp_path / str(number) / "adapter_config.json").read_text())
        assert config["r"] == config["lora_alpha"] and not config["use_rslora"] and not config["alpha_pattern"]
        again = graft.load(base("llama"), tmp_path / str(number), name="a")
        torch.testing.assert_close(logits(again, ids()), logits(model, ids()), atol=1e-5, rtol=0)


def test_a_merged_model_is_saved_as_a_merged_model(tmp_path: Path) -> None:
    model = with_adapters("llama", a=LORA, b=graft.IA3())
    graft.merge(model, "a")
    model.save_pretrained(tmp_path / "merged")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    assert type(again).__name__ == "LlamaForCausalLM" and not [name for name in again.state_dict() if "graft" in name]
    assert torch.equal(logits(again, ids()), logits(model, ids()))
    graft.unmerge(model, "a")
    model.save_pretrained(tmp_path / "beside")
    assert json.loads((tmp_path / "beside" / "adapter_config.json").read_text())["adapters"].keys() == {"a", "b"}
    with pytest.raises(graft.GraftError, match="is not empty and holds no adapter"):
        model.save_pretrained(tmp_path / "merged")  # its model.safetensors is a whole model


def test_saving_replaces_adapters_of_graft_only_and_keeps_everything_else(tmp_path: Path) -> None:
    model = with_adapters("llama", a=LORA)
    graft.export(model, "a", tmp_path / "peft")
    before = contents(tmp_path / "peft")
    with pytest.raises(graft.GraftError, match="another library wrote"):
        graft.save(model, "a", tmp_path / "peft")
    (tmp_path / "file").write_text("mine")
    with pytest.raises(graft.GraftError, match="is a file"):
        graft.save(model, "a", tmp_path / "file")
    assert contents(tmp_path / "peft") == before and (tmp_path / "file").read_text() == "mine"
    own = graft.save(model, "a", tmp_path / "own", extra_files={"README.md": "card"})
    (own / "notes.txt").write_text("mine")
    (own / ".git").mkdir()
    (own / ".git" / "HEAD").write_text("ref")
    (own / "link").symlink_to("notes.txt")
    graft.save(with_adapters("llama", a=graft.IA3()), "a", own)
    assert (own / "notes.txt").read_text() == "mine" and (own / ".git" / "HEAD").read_text() == "ref"
    assert (own / "link").is_symlink() and (own / "README.md").read_text() == "card"
    assert json.loads((own / "adapter_config.json").read_text())["adapter"]["kind"] == "ia3"


def test_whoever_may_read_the_config_may_read_the_weights(tmp_path: Path) -> None:
    model = with_adapters("llama", a=LORA)
    before = os.umask(0o027)
    try:
        graft.save(model, "a", tmp_path / "own")
        graft.export(model, "a", tmp_path / "peft")
        model.save_pretrained(tmp_path / "trainer")
    finally:
        os.umask(before)
    for folder in ("own", "peft", "trainer"):
        assert {stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / folder).iterdir()} == {0o640}, folder

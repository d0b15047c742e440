"""PEFT itself loads what Graft exports and computes the same; Graft reads it back bit for bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import graft
from graft.attaching.parameters import tensors
from graft.injection.state import state_of
from tests.contract.table import base, ids, logits, randomise

SPECS: dict[str, tuple[str, Any]] = {
    "lora": ("llama", graft.LoRA(rank=4, alpha=6, sites="linear")),
    "lora-layers": ("llama", graft.LoRA(rank=4, sites="attn.q mlp.down@1")),
    "lora-patterns": (
        "llama",
        graft.LoRA(rank=4, alpha=3, rslora=True, rank_pattern={"mlp.down": 2}, alpha_pattern={"attn.q": 5}),
    ),
    "lora-embed": ("llama", graft.LoRA(rank=4, sites="embed attn.q")),
    "lora-bias": ("bert", graft.LoRA(rank=4, alpha=4, train_bias=True, sites="attn.q mlp.up")),
    "lora-conv1d": ("gpt2", graft.LoRA(rank=4, sites="attn.qkv mlp.up")),
    "lora-t5": ("t5", graft.LoRA(rank=4, sites="attn.q cross.v")),
    "adalora": ("llama", graft.AdaLoRA(init_rank=4, target_rank=None, sites="attn.q mlp.up")),
    "ia3": ("llama", graft.IA3()),
    "ia3-bert": ("bert", graft.IA3()),
    "vera": ("llama", graft.VeRA(rank=6)),
    "vera-drawn": ("llama", graft.VeRA(rank=6, seed=3, save_projection=False)),
    "loha": ("llama", graft.LoHa(rank=3, alpha=5, sites="attn.q mlp.up")),
    "lokr": ("llama", graft.LoKr(rank=2, alpha=5, sites="attn.q mlp.down")),
    "lokr-both": ("bert", graft.LoKr(rank=1, decompose_both=True, factor=4, sites="attn.q")),
    "miss": ("llama", graft.MiSS(rank=7, dropout=0.1, sites="attn.q mlp.up")),
    "miss-mini": ("llama", graft.MiSS(rank=6, variant="mini", mini_rank=4, sites="attn.q@1 mlp.up@1")),
    "miss-bat": ("bert", graft.MiSS(rank=8, variant="bat", sites="attn.q mlp.up")),
    "hira": ("llama", graft.HiRA(rank=4, alpha=4, dropout=0.1)),
    "hira-conv1d": ("gpt2", graft.HiRA(rank=3, alpha=3, sites="attn.qkv mlp.up")),
    "shira": ("llama", graft.SHiRA(rank=2, sites="attn.q mlp.up")),
    "shira-shape": ("bert", graft.SHiRA(rank=2, seed=5, mask_per="shape", sites="attn.q@1 mlp.up@1")),
    "oft": ("llama", graft.OFT(block_size=8)),
    "oft-exact": ("bert", graft.OFT(blocks=4, terms=None, share=True, dropout=0.1, sites="attn.q mlp.up")),
    "oft-coft": ("llama", graft.OFT(block_size=7, coft=0.3, terms=8, sites="attn.v@1 mlp.down@1")),
    "prompt": ("llama", graft.PromptTuning(tokens=4, window="hides")),
    "prefix": ("llama", graft.Prefix(tokens=4, positions="after_prefix", window="hides", init_std=1.0)),
    "prompt-t5": ("t5", graft.PromptTuning(tokens=4, window="hides")),
    "adaption": ("llama", graft.LLaMAAdapter(tokens=3, gate="layer", squash="none", sites="attn@last1")),
    "adaption-gpt2": ("gpt2", graft.LLaMAAdapter(tokens=3, gate="layer", squash="none", adds="after_o", sites="attn")),
    "dora": ("llama", graft.DoRA(rank=4, sites="attn.v mlp.up")),
}
CONVERTED: dict[str, tuple[str, Any]] = {
    "lora-slices": ("gpt2", graft.LoRA(rank=4, alpha=3, sites="attn.q attn.v")),
    "lora-bloom-slices": ("bloom", graft.LoRA(rank=4, alpha=3, sites="attn.q attn.v")),
    "p-tuning": ("llama", graft.PTuning(tokens=4, hidden=6, window="hides")),
    "pissa": ("llama", graft.PiSSA(rank=4, sites="attn.q")),
    "saved-modules": ("llama", [graft.LoRA(rank=4, sites="attn.q"), graft.Full(sites="norm.attn"), graft.Full(sites="head")]),
    "token-rows": ("llama", [graft.LoRA(rank=4, sites="attn.q"), graft.Full(tokens=(5, 9), sites="embed")]),
}  # fmt: skip


def exported(family: str, spec: Any, folder: Path) -> Any:
    model = base(family)
    graft.attach(model, {"a": spec})
    randomise(model, "a")
    graft.export(model, "a", folder)
    return model


def outputs_of_peft(family: str, folder: Path) -> torch.Tensor:
    peft = pytest.importorskip("peft")
    model = peft.PeftModel.from_pretrained(base(family), folder).eval()
    inputs = ids()
    more = {"decoder_input_ids": inputs} if family == "t5" else {}
    with torch.no_grad():
        return model(input_ids=inputs, **more).logits[:, -inputs.shape[1] :]  # virtual tokens come first


@pytest.mark.parametrize("name", [*SPECS, *CONVERTED])
def test_peft_computes_the_same(name: str, tmp_path: Path) -> None:
    family, spec = (SPECS | CONVERTED)[name]
    model = exported(family, spec, tmp_path / "peft")
    torch.testing.assert_close(outputs_of_peft(family, tmp_path / "peft"), logits(model, ids()), atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", SPECS)
def test_there_and_back_every_tensor_is_the_same(name: str, tmp_path: Path) -> None:
    family, spec = SPECS[name]
    model = exported(family, spec, tmp_path / "peft")
    again = graft.load(base(family), tmp_path / "peft", name="a")
    first, second = (dict(tensors(m, state_of(m), "a")) for m in (model, again))
    assert {key: tensor.shape for key, tensor in first.items()} == {key: tensor.shape for key, tensor in second.items()}
    assert all(torch.equal(tensor, second[key]) for key, tensor in first.items())
    torch.testing.assert_close(logits(again, ids()), logits(model, ids()), atol=0, rtol=0)


def test_names_of_targets_are_short(tmp_path: Path) -> None:
    import json

    exported("llama", graft.LoRA(rank=2, sites="attn.q attn.v"), tmp_path / "all")
    exported("llama", graft.LoRA(rank=2, sites="attn.q@1"), tmp_path / "one")
    config = json.loads((tmp_path / "all" / "adapter_config.json").read_text())
    assert config["target_modules"] == ["q_proj", "v_proj"]
    config = json.loads((tmp_path / "one" / "adapter_config.json").read_text())
    assert config["target_modules"] == ["q_proj"] and config["layers_to_transform"] == [1]
    assert len(load_file(tmp_path / "one" / "adapter_model.safetensors")) == 2


@pytest.mark.parametrize(
    ("spec", "reason"),
    [
        (graft.Series(), "PEFT has no kind that computes what 'series' does"),
        ([graft.LoRA(), graft.Prefix()], "a PEFT folder holds one kind"),
        (graft.Full(sites="head"), "only together with another kind"),
        (
            graft.LLaMAAdapter(),
            "compute gate: layer, squash: none, adds: before_o; this adapter has gate: head, squash: tanh",
        ),
        (
            graft.LLaMAAdapter(gate="layer", squash="none", sites="attn@0"),
            "in the topmost layers; this adapter has layers 0 of 2",
        ),
    ],
)
def test_what_peft_cannot_hold_is_refused_with_the_reason(spec: Any, reason: str, tmp_path: Path) -> None:
    model = base("llama")
    graft.attach(model, {"a": spec})
    with pytest.raises(graft.GraftError, match=reason):
        graft.export(model, "a", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("spec", [graft.PromptTuning(tokens=2), graft.Prefix(tokens=2, positions="after_prefix")])
def test_virtual_tokens_that_a_sliding_window_would_hide_in_peft_are_refused(spec: Any, tmp_path: Path) -> None:
    model = base("gemma2")
    graft.attach(model, {"a": spec})
    with pytest.raises(graft.GraftError, match="trained with window: shows"):
        graft.export(model, "a", tmp_path / "out")

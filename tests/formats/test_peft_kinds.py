"""PEFT's folders of MiSS, HiRA, SHiRA and OFT: what PEFT saved computes the same, in unusual settings too; unknown fields are named."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import graft
from graft.attaching.parameters import modules_of
from graft.injection.state import state_of
from tests.contract.table import base, ids, logits, randomise

QD, LINEAR = {"target_modules": ["q_proj", "down_proj"]}, {"target_modules": "all-linear"}
BERT = {"target_modules": ["query", "intermediate.dense"]}
SAVED: dict[str, tuple[str, str, dict[str, Any]]] = {
    "miss": ("llama", "MissConfig", {"r": 8, **LINEAR}),
    "miss-uneven": ("llama", "MissConfig", {"r": 7, "miss_dropout": 0.1, **QD, "layers_to_transform": [1], "layers_pattern": "layers"}),
    "miss-random": ("llama", "MissConfig", {"r": 8, "init_weights": False, "target_modules": "model.layers.1.*(q|v)_proj"}),
    "miss-mini": ("llama", "MissConfig", {"r": 5, "init_weights": "mini", "mini_r": 4, **QD}),
    "miss-bat": ("bert", "MissConfig", {"r": 8, "init_weights": "bat", **BERT}),
    "miss-biases": ("bert", "MissConfig", {"r": 6, "bias": "MiSS_only", **BERT}),
    "miss-excluding": ("llama", "MissConfig", {"r": 6, **LINEAR, "exclude_modules": ["k_proj"], "modules_to_save": ["lm_head"]}),
    "hira": ("llama", "HiraConfig", {"r": 4, **LINEAR}),
    "hira-ranks": ("llama", "HiraConfig", {"r": 4, "rank_pattern": {"q_proj": 2}, "hira_dropout": 0.1, **QD}),
    "hira-gaussian": ("bert", "HiraConfig", {"r": 4, "init_weights": "gaussian", **BERT}),
    "hira-conv1d": ("gpt2", "HiraConfig", {"r": 4, "target_modules": ["c_attn", "mlp.c_proj"], "fan_in_fan_out": True}),
    "shira": ("llama", "ShiraConfig", {"r": 3, **LINEAR}),
    "shira-seed": ("bert", "ShiraConfig", {"r": 2, "random_seed": 7, **BERT}),
    "oft": ("llama", "OFTConfig", {"oft_block_size": 8, **LINEAR}),
    "oft-adjusted": ("llama", "OFTConfig", {"oft_block_size": 32, "module_dropout": 0.1, **QD}),
    "oft-blocks": ("llama", "OFTConfig", {"r": 4, "oft_block_size": 0, "block_share": True, **QD}),
    "oft-exact": ("llama", "OFTConfig", {"oft_block_size": 8, "use_cayley_neumann": False, **QD}),
    "oft-coft": ("llama", "OFTConfig", {"oft_block_size": 8, "coft": True, "eps": 0.2, **QD}),
    "oft-terms": ("llama", "OFTConfig", {"oft_block_size": 8, "num_cayley_neumann_terms": 3, **QD}),
    "oft-biases": ("bert", "OFTConfig", {"oft_block_size": 8, "bias": "oft_only", **BERT}),
    "oft-all-biases": ("bloom", "OFTConfig", {"oft_block_size": 8, "bias": "all", "target_modules": ["query_key_value"]}),
}  # fmt: skip


def saved(name: str, folder: Path, scale: float = 0.2) -> tuple[str, Tensor]:
    """A folder that PEFT wrote after all that trains was moved, and what PEFT computes."""
    peft = pytest.importorskip("peft")
    family, kind, settings = SAVED[name]
    model = peft.get_peft_model(base(family), getattr(peft, kind)(**settings)).eval()
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * scale)
    model.save_pretrained(folder)
    return family, logits(model, ids())


@pytest.mark.parametrize("name", SAVED)
def test_a_folder_that_peft_saved_computes_the_same(name: str, tmp_path: Path) -> None:
    family, expected = saved(name, tmp_path / "peft")
    model = graft.load(base(family), tmp_path / "peft", name="a")
    found = logits(model, ids())
    torch.testing.assert_close(found, expected, atol=1e-5 * max(1.0, float(expected.abs().max())), rtol=0)
    assert not torch.allclose(found, logits(base(family), ids()), atol=1e-3)


def edited(folder: Path, **fields: Any) -> Path:
    file = folder / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **fields}))
    return folder


@pytest.mark.parametrize(
    ("name", "fields", "message"),
    [
        ("miss", {"miss_alpha": 2.0}, r"PEFT's MISS with miss_alpha: 2.0 has no equal in Graft, which knows its fields r, mini_r"),
        ("miss", {"r": None}, "lacks the field 'r'"),
        ("miss", {"init_weights": "new"}, "MiSS with init_weights 'new' has no equal in Graft, which knows bat, mini, true and false"),
        ("hira", {"alpha_pattern": {"q": 2}, "use_dora": True}, r"HIRA with alpha_pattern: \{'q': 2\}, use_dora: True has no equal"),
        ("shira", {"scaling": 0.5}, "PEFT's SHIRA with scaling: 0.5 has no equal"),
        ("oft", {"kernel": [3, 3]}, r"PEFT's OFT with kernel: \[3, 3\] has no equal"),
        ("oft", {"num_cayley_neumann_terms": 2}, "PEFT's series of 2 terms is no rotation"),
        ("oft", {"peft_version": "0.17.1"}, "was written by PEFT 0.17.1; its series differs from that of 0.18"),
        ("oft", {"peft_version": None}, "was written by PEFT before 0.18"),
        ("oft", {"oft_block_size": None}, "lacks the field 'oft_block_size'"),
    ],
)  # fmt: skip
def test_what_a_config_says_and_nobody_reads_is_named(
    name: str, fields: dict[str, Any], message: str, tmp_path: Path
) -> None:
    family, _ = saved(name, tmp_path / "peft")
    with pytest.raises(graft.GraftError, match=message):
        graft.load(base(family), edited(tmp_path / "peft", **fields), name="a")


def test_fields_that_are_off_need_no_reader(tmp_path: Path) -> None:
    family, expected = saved("miss", tmp_path / "peft")
    folder = edited(tmp_path / "peft", use_new=False, new_pattern={}, new_dropout=0.0, new_config=None)
    torch.testing.assert_close(logits(graft.load(base(family), folder, name="a"), ids()), expected, atol=5e-5, rtol=0)


@pytest.mark.parametrize("name", ["miss", "hira", "shira", "oft"])
def test_a_tensor_that_is_missing_or_left_over_is_named(name: str, tmp_path: Path) -> None:
    family, _ = saved(name, tmp_path / "peft")
    file = tmp_path / "peft" / "adapter_model.safetensors"
    tensors = load_file(file)
    first = sorted(tensors)[0]
    tensors["base_model.model.model.layers.9.strange"] = tensors.pop(first)
    save_file(tensors, file)
    with pytest.raises(graft.GraftError, match=r"1 missing: .*; 1 unexpected: model.layers.9.strange"):
        graft.load(base(family), tmp_path / "peft", name="a")


def test_hira_on_an_embedding_is_refused_by_its_name(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    peft.get_peft_model(base("llama"), peft.HiraConfig(r=2, target_modules=["embed_tokens"])).save_pretrained(tmp_path)
    with pytest.raises(graft.GraftError, match="'model.embed_tokens' is a Embedding; HIRA is read at linear layers"):
        graft.load(base("llama"), tmp_path, name="a")


def test_a_mask_of_the_user_s_own_is_read_as_it_is(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    config = peft.ShiraConfig(r=2, mask_type="first", target_modules=["q_proj"])
    config.mask_fn = lambda layer, r, **_: (torch.arange(layer.weight.numel()) < r * sum(layer.weight.shape)).view(
        layer.weight.shape
    )
    model = peft.get_peft_model(base("llama"), config).eval()
    with torch.no_grad():
        for parameter in (p for p in model.parameters() if p.requires_grad):
            parameter.normal_()
    model.save_pretrained(tmp_path)
    again = graft.load(base("llama"), tmp_path, name="a")
    torch.testing.assert_close(logits(again, ids()), logits(model, ids()), atol=5e-5, rtol=0)
    for _, module in modules_of(again, state_of(again), "a"):
        assert module.positions[0].max() == 3


@pytest.mark.parametrize(
    ("family", "spec", "message"),
    [
        ("gpt2", graft.MiSS(rank=4, sites="mlp.up"), "PEFT has no MiSS for transposed layers"),
        ("gpt2", graft.SHiRA(rank=2, sites="mlp.up"), "PEFT has no SHiRA for transposed layers"),
        ("gpt2", graft.OFT(block_size=8, sites="mlp.up"), "PEFT has no OFT for transposed layers"),
        ("gpt2", graft.HiRA(rank=2, sites="attn.q"), "PEFT's HiRA holds one adapter for a whole layer; this one acts on slices"),
        ("bloom", graft.OFT(block_size=8, sites="attn.q"), "PEFT's OFT holds one adapter for a whole layer"),
        ("llama", graft.OFT(block_size=8, terms=3), "PEFT computes something else for a series of 3 terms"),
        ("llama", [graft.MiSS(rank=4, sites="attn.q"), graft.MiSS(rank=8, sites="attn.v")], "PEFT's MiSS has one setting for all layers"),
        ("llama", [graft.OFT(sites="attn.q"), graft.OFT(blocks=2, sites="attn.v")], "PEFT's OFT has one setting for all layers"),
        ("llama", [graft.VeRA(rank=4, sites="attn.q"), graft.VeRA(rank=8, sites="attn.v")], "PEFT's VeRA has one setting for all layers"),
        ("llama", [graft.LoKr(factor=4, sites="attn.q"), graft.LoKr(factor=8, sites="attn.v")], "PEFT's LOKR has one setting .* factor"),
    ],
)  # fmt: skip
def test_what_peft_cannot_hold_is_refused(family: str, spec: Any, message: str, tmp_path: Path) -> None:
    model = base(family)
    graft.attach(model, {"a": spec})
    with pytest.raises(graft.GraftError, match=message):
        graft.export(model, "a", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_what_is_converted_on_the_way_is_noted_and_peft_computes_the_same(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    model = base("llama")
    graft.attach(model, {"a": graft.HiRA(rank=4, alpha=2, rank_pattern={"attn.q": 2}, sites="attn.q mlp.down")})
    randomise(model, "a")
    notes = graft.export(model, "a", tmp_path / "out")
    assert [note.partition(":")[0] for note in notes] == ["PEFT's HiRA has no scale", "PEFT's HiRA has one rank"]
    theirs = peft.PeftModel.from_pretrained(base("llama"), tmp_path / "out").eval()
    torch.testing.assert_close(logits(theirs, ids()), logits(model, ids()), atol=5e-5, rtol=0)


@pytest.mark.parametrize(
    ("spec", "note"),
    [
        (graft.MiSS(rank=8, variant="bat", dropout=0.1), "PEFT stores dropout and does not apply it"),
        (graft.SHiRA(rank=2, dropout=0.1), "dropout is not written"),
        (graft.OFT(block_size=8, dropout=0.1), "PEFT stores dropout as module_dropout and does not apply it"),
    ],
)
def test_dropout_that_peft_does_not_apply_is_noted(spec: Any, note: str, tmp_path: Path) -> None:
    model = base("llama")
    graft.attach(model, {"a": spec})
    assert [found.partition(":")[0] for found in graft.export(model, "a", tmp_path / "out")] == [note]


def test_peft_turns_no_block_off_for_module_dropout() -> None:
    """The defect that the note speaks of; this test fails when PEFT mends it."""
    peft = pytest.importorskip("peft")
    config = peft.OFTConfig(oft_block_size=8, module_dropout=0.9, init_weights=False, target_modules=["q_proj"])
    model = peft.get_peft_model(base("llama"), config)
    assert torch.equal(logits(model.train(), ids()), logits(model.eval(), ids()))


def test_peft_gives_every_layer_one_rank_of_hira_whatever_the_pattern() -> None:
    """Why files are read by their shapes; this test fails when PEFT mends it."""
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(base("llama"), peft.HiraConfig(r=4, rank_pattern={"q_proj": 2}, **QD))
    assert {len(p) for name, p in model.named_parameters() if "hira_A" in name} == {4}

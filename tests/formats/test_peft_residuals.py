"""PEFT's LoRAs beside a changed base (PiSSA, OLoRA), read for the base as it is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor

import graft
from graft.attaching.parameters import tensors
from graft.injection.state import state_of
from tests.contract.table import base, ids, logits

CASES = [("llama", "pissa"), ("llama", "olora"), ("gpt2", "pissa"), ("bert", "pissa"), ("bert", "olora")]
TARGETS = {"llama": ["q_proj", "v_proj", "down_proj"], "gpt2": ["c_attn", "c_fc"], "bert": ["query", "value"]}


def _trained(family: str, start: str, folder: Path, **settings: Any) -> Any:
    """PEFT's model after three steps of training, saved."""
    torch.manual_seed(0)
    config = peft.LoraConfig(r=3, lora_alpha=5, init_lora_weights=start, target_modules=TARGETS[family],
                             fan_in_fan_out=family == "gpt2", **settings)  # fmt: skip
    model = peft.get_peft_model(base(family), config)
    if start in ("pissa", "olora"):
        model.peft_config[
            "default"
        ].init_lora_weights = True  # what the folder of the start says, so that PEFT can convert
        model.save_pretrained(folder / "start")
        model.peft_config["default"].init_lora_weights = start
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.05)
    for _ in range(3):
        model(input_ids=ids()).logits.square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(folder / "peft")
    return model.eval()


def _of(model: Any) -> Tensor:
    with torch.no_grad():
        return model(input_ids=ids()).logits


@pytest.mark.parametrize(("family", "start"), CASES)
def test_a_folder_of_peft_means_here_what_it_meant_beside_its_residual(family: str, start: str, tmp_path: Path) -> None:
    theirs = _trained(family, start, tmp_path)
    mine = graft.load(base(family), tmp_path / "peft", name="a")
    again = peft.PeftModel.from_pretrained(base(family), tmp_path / "peft").eval()
    bare = _of(base(family))
    assert (_of(theirs) - bare).abs().max() > 1e-2 * bare.abs().max()
    assert (logits(mine, ids()) - _of(theirs)).abs().max() < 1e-5 * bare.abs().max()
    assert (logits(mine, ids()) - _of(again)).abs().max() < 1e-5 * bare.abs().max()
    with graft.use(mine, None):
        assert torch.equal(logits(mine, ids()), bare)  # in PEFT the base is gone


def test_patterns_scales_and_biases_go_along_and_our_own_folder_takes_no_decomposition(tmp_path: Path) -> None:
    theirs = _trained(
        "llama", "pissa", tmp_path, rank_pattern={"v_proj": 2}, alpha_pattern={"down_proj": 9}, use_rslora=True
    )
    mine = graft.load(base("llama"), tmp_path / "peft", name="a")
    assert (logits(mine, ids()) - _of(theirs)).abs().max() < 1e-5 * _of(theirs).abs().max()
    graft.save(mine, "a", tmp_path / "graft")
    again = graft.load(base("llama"), tmp_path / "graft", name="a")
    for (name, one), (_, other) in zip(*(tensors(m, state_of(m), "a") for m in (mine, again)), strict=True):
        assert torch.equal(one, other), name
    graft.export(mine, "a", tmp_path / "lora")
    plain = peft.PeftModel.from_pretrained(base("llama"), tmp_path / "lora").eval()
    assert (_of(plain) - _of(theirs)).abs().max() < 1e-5 * _of(theirs).abs().max()


@pytest.mark.parametrize("start", ["pissa", "olora"])
def test_what_peft_converted_is_a_plain_lora_of_twice_the_rank(start: str, tmp_path: Path) -> None:
    theirs = _trained("llama", start, tmp_path)
    expected = _of(theirs)
    theirs.peft_config["default"].init_lora_weights = start
    theirs.save_pretrained(tmp_path / "converted", path_initial_model_for_weight_conversion=str(tmp_path / "start"))
    mine = graft.load(base("llama"), tmp_path / "converted", name="a")
    assert {installed.config.kind for installed in state_of(mine).adapter("a").installs} == {"lora"}
    assert (logits(mine, ids()) - expected).abs().max() < 1e-5 * expected.abs().max()


def test_mica_and_orthogonal_leave_the_base_as_it_is(tmp_path: Path) -> None:
    for start, settings in (("mica", {}), ("orthogonal", {"rank_pattern": {".*": 2}})):
        theirs = _trained("llama", start, tmp_path / start, **settings)
        mine = graft.load(base("llama"), tmp_path / start / "peft", name="a")
        assert (logits(mine, ids()) - _of(theirs)).abs().max() < 1e-5 * _of(theirs).abs().max()


@pytest.mark.parametrize(
    ("start", "reason"),
    [("pissa_niter_4", "randomised"), ("corda", "data"), ("lora_ga", "gradients"), ("loftq", "quantised")],
)
def test_starts_that_the_base_does_not_say_are_refused_by_name(start: str, reason: str, tmp_path: Path) -> None:
    import json

    _trained("llama", "pissa", tmp_path)
    path = tmp_path / "peft" / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "init_lora_weights": start}))
    with pytest.raises(graft.GraftError, match=f"'{start}'.*{reason}"):
        graft.load(base("llama"), tmp_path / "peft")


@pytest.mark.parametrize("start", ["pissa", "olora"])
def test_a_base_that_does_not_determine_the_start_is_refused(start: str, tmp_path: Path) -> None:
    _trained("llama", start, tmp_path)
    model = base("llama")
    with torch.no_grad():
        for layer in model.model.layers:
            weight = layer.self_attn.q_proj.weight
            weight.copy_(torch.eye(len(weight)) if start == "pissa" else torch.ones_like(weight))
    with pytest.raises(graft.GraftError, match="cannot be known|not unique"):
        graft.load(model, tmp_path / "peft")
    assert not graft.names(model)

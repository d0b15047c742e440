"""What an exported folder calls its base: PEFT finds it where that tells nothing of the machine, or where the user says so."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import AutoPeftModelForCausalLM
from transformers import AutoModelForCausalLM

import graft
import graft.seedling
from tests.contract.table import randomise
from tests.small import save_small

IDS = torch.arange(2, 22).view(2, 10)


@pytest.fixture
def base(tmp_path: Path) -> Path:
    save_small(tmp_path / "home" / "models" / "small")
    return tmp_path / "home" / "models" / "small"


def adapted(base: Path | str) -> Any:
    model = AutoModelForCausalLM.from_pretrained(base).eval()
    graft.attach(model, {"a": graft.LoRA(rank=2, sites="attn.q")})
    randomise(model, "a", 0)
    return model


def named(folder: Path, key: str = "base_model_name_or_path") -> Any:
    return json.loads((folder / "adapter_config.json").read_text())[key]


def same_by_peft(folder: Path, model: Any) -> bool:
    with torch.no_grad():
        found = AutoPeftModelForCausalLM.from_pretrained(folder).eval()(IDS).logits
        return torch.allclose(found, model(IDS).logits, atol=1e-4)


def test_a_folder_below_the_current_one_is_found_from_there(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path / "home")
    for number, given in enumerate((base, "models/small")):
        model = adapted(given)
        assert graft.export(model, "a", tmp_path / f"out{number}") == []
        assert named(tmp_path / f"out{number}") == "models/small"
        assert same_by_peft(tmp_path / f"out{number}", model)


def test_another_folder_is_named_by_its_last_part_unless_a_name_is_given(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    model = adapted(base)
    (note,) = graft.export(model, "a", tmp_path / "short")
    assert "call the base 'small'" in note and "AutoPeftModel finds no base under this name. --base-name" in note
    assert named(tmp_path / "short") == "small"
    assert not any(str(tmp_path).encode() in file.read_bytes() for file in (tmp_path / "short").iterdir())
    assert graft.export(model, "a", tmp_path / "full", base_name=str(base)) == []
    assert named(tmp_path / "full") == str(base) and same_by_peft(tmp_path / "full", model)
    graft.export(model, "a", tmp_path / "llm", format="llm-adapters", base_name="owner/name")
    assert named(tmp_path / "llm") == "owner/name"
    graft.export(model, "a", tmp_path / "hub", format="adapterhub", base_name="owner/name")
    assert named(tmp_path / "hub", "model_name") == "owner/name"
    assert graft.load(AutoModelForCausalLM.from_pretrained(base), tmp_path / "short", name="b")


def test_the_embedded_base_has_its_name(tmp_path: Path) -> None:
    model = adapted(graft.seedling.path())
    (note,) = graft.export(model, "a", tmp_path / "out")
    assert named(tmp_path / "out") == "seedling" and "call the base 'seedling'" in note
    graft.save(model, "a", tmp_path / "own")
    assert json.loads((tmp_path / "own/adapter_config.json").read_text())["base"]["model"] == "seedling"

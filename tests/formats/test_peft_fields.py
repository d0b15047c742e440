"""Fields of PEFT's configs: each is used, defaulted or named; short configs are PEFT's; which of two files of weights is read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import peft
import pytest

import graft
from graft.formats.peft.fields import FIELDS
from tests.formats.peft_folders import edited, llama, loaded, off, saved

SHORT: dict[str, dict[str, Any]] = {
    "plain": {}, "rslora": {"use_rslora": True}, "alphas": {"alpha_pattern": {"q_proj": 64}}, "ranks": {"rank_pattern": {"q_proj": 2}},
    "dora": {"use_dora": True}, "layers": {"layers_to_transform": [1]}, "bias of B": {"lora_bias": True},
    "saved module": {"modules_to_save": ["lm_head"]}, "rows": {"trainable_token_indices": [3, 5]},
    "excluding": {"exclude_modules": ["model.layers.0.self_attn.q_proj"]}, "pattern": {"target_modules": r".*layers\.1.*q_proj"},
    "pissa": {"init_lora_weights": "pissa"},
}  # fmt: skip


@pytest.mark.parametrize("name", SHORT)
def test_a_config_with_only_the_fields_that_it_needs_is_pefts(name: str, tmp_path: Path) -> None:
    settings = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"], **SHORT[name]}
    want = saved(llama(), peft.LoraConfig(**settings), tmp_path / "a")
    file = tmp_path / "a" / "adapter_config.json"
    whole = json.loads(file.read_text())
    file.write_text(json.dumps({key: whole[key] for key in ("peft_type", *settings)}))
    assert off(loaded(llama(), tmp_path / "a"), want) < 1e-5


def test_fields_that_are_left_out_have_pefts_defaults(tmp_path: Path) -> None:
    want = saved(llama(), peft.LoraConfig(target_modules=["q_proj"]), tmp_path / "a")
    (tmp_path / "a" / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    assert off(loaded(llama(), tmp_path / "a"), want) < 1e-5


def test_the_known_fields_are_those_of_the_installed_peft() -> None:
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

    for kind, fields in FIELDS.items():
        theirs = set(PEFT_TYPE_TO_CONFIG_MAPPING[kind].__dataclass_fields__)  # pyright: ignore
        assert theirs <= set(fields.model_fields), kind


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"use_lora_plus": True},
            "PEFT's LORA with use_lora_plus: True has no equal in Graft, which knows its fields r, lora_alpha",
        ),
        ({"lora_aplha": 4}, "lora_aplha: 4 has no equal in Graft.*Did you mean 'lora_alpha'"),
        ({"use_qalora": True}, "PEFT's LORA with use_qalora: True has no equal in Graft"),
        ({"alora_invocation_tokens": [1]}, r"alora_invocation_tokens: \[1\] has no equal"),
        ({"r": "4"}, "r: '4' is not allowed"),
        ({"r": None}, "lacks the field 'r'"),
        ({"lora_alpha": float("nan")}, "NaN is not a number that JSON has"),
        ({"use_rslora": "false"}, "use_rslora: 'false' is not allowed"),
        ({"rank_pattern": {"q_proj": 2.5}}, "rank_pattern.q_proj: 2.5 is not allowed"),
        ({"bias": "some"}, "bias: 'some' is not allowed"),
        ({"target_modules": [3]}, "target_modules"),
        (
            {"target_modules": ".*q_proj", "layers_to_transform": [1]},
            "layers_to_transform needs a list in target_modules",
        ),
        ({"layers_pattern": "layers"}, "layers_pattern 'layers' has no effect without layers_to_transform"),
    ],
)
def test_a_field_that_cannot_be_read_is_named(fields: dict[str, Any], message: str, tmp_path: Path) -> None:
    saved(llama(), peft.LoraConfig(target_modules=["q_proj"]), tmp_path / "a")
    model = llama()
    with pytest.raises(graft.GraftError, match=message):
        graft.load(model, edited(tmp_path / "a", **fields))
    assert not graft.names(model)


def test_unknown_fields_that_are_off_do_not_matter(tmp_path: Path) -> None:
    want = saved(llama(), peft.LoraConfig(target_modules=["q_proj"]), tmp_path / "a")
    edited(tmp_path / "a", use_new_thing=False, new_config=None, new_list=[])
    assert off(loaded(llama(), tmp_path / "a"), want) < 1e-5


@pytest.mark.parametrize("differ", [True, False])
def test_of_two_files_of_weights_the_safetensors_is_read(differ: bool, tmp_path: Path) -> None:
    config = peft.LoraConfig(target_modules=["q_proj"])
    saved(llama(), config, tmp_path / "a", 0.3 if differ else 0.1, safe_serialization=False)
    want = saved(llama(), config, tmp_path / "a")
    if differ:
        with pytest.warns(UserWarning, match="adapter_model.safetensors is read, adapter_model.bin is not"):
            found = loaded(llama(), tmp_path / "a")
    else:
        found = loaded(llama(), tmp_path / "a")
    assert off(found, want) < 1e-5

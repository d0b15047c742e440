"""Loading a base: where it comes from, on what it runs, and what is said when it cannot."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

import graft
from graft.bases import load_base, load_model, load_tokenizer, memory_report
from graft.config.base import BaseConfig
from graft.errors import GraftError
from tests.small import save_small, small_model

CPU = {"device": "cpu"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_small(tmp_path_factory.mktemp("bases") / "tiny-llama")


def test_a_folder_gives_the_model_and_its_tokenizer_frozen_and_in_evaluation_mode(folder: Path) -> None:
    base = load_base(BaseConfig(model=str(folder), **CPU))
    assert base.tokenizer.decode(base.tokenizer("a b")["input_ids"]) == "a b"
    assert base.dtype == torch.float32 and base.device == torch.device("cpu")
    assert not base.model.training and not any(p.requires_grad for p in base.model.parameters())
    reference = AutoModelForCausalLM.from_pretrained(folder)
    ids = torch.arange(2, 12)[None]
    assert torch.equal(base.model(ids).logits, reference(ids).logits)


def test_the_dtype_that_is_asked_for_is_loaded_and_leaves_the_identity_unchanged(folder: Path) -> None:
    low = load_base(BaseConfig(model=str(folder), dtype="bfloat16", **CPU))
    full = load_base(BaseConfig(model=str(folder), dtype="float32", **CPU))
    assert low.dtype == torch.bfloat16 and full.dtype == torch.float32
    assert low.identity == full.identity and full.identity["digest"]


def test_the_attention_backend_that_is_asked_for_is_used(folder: Path) -> None:
    assert load_model(BaseConfig(model=str(folder), attention="eager", **CPU)).config._attn_implementation == "eager"


def test_a_missing_folder_is_named_together_with_the_one_that_was_meant(folder: Path) -> None:
    with pytest.raises(GraftError, match="there is no folder .*tiny-lama.*Did you mean '.*tiny-llama'"):
        load_model(BaseConfig(model=str(folder.parent / "tiny-lama"), **CPU))


def test_a_folder_without_a_model_and_a_file_are_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(GraftError, match="holds no model"):
        load_model(BaseConfig(model=str(tmp_path), **CPU))
    (tmp_path / "adapter_config.json").touch()
    with pytest.raises(GraftError, match="holds an adapter, so name"):
        load_model(BaseConfig(model=str(tmp_path), **CPU))
    with pytest.raises(GraftError, match="is a file"):
        load_model(BaseConfig(model=str(folder / "config.json"), **CPU))


def test_a_folder_without_a_tokenizer_is_refused_where_transformers_would_make_an_empty_one(tmp_path: Path) -> None:
    small_model("gpt2").save_pretrained(tmp_path)
    with pytest.raises(GraftError, match="holds no tokenizer"):
        load_tokenizer(BaseConfig(model=str(tmp_path)))


def test_truncated_weights_are_refused(folder: Path, tmp_path: Path) -> None:
    for file in folder.iterdir():
        data = file.read_bytes()
        (tmp_path / file.name).write_bytes(data[: len(data) // 2] if file.suffix == ".safetensors" else data)
    with pytest.raises(GraftError, match="cannot be loaded"):
        load_model(BaseConfig(model=str(tmp_path), **CPU))


def test_weights_that_lack_a_tensor_are_refused_where_transformers_would_make_one_up(
    folder: Path, tmp_path: Path
) -> None:
    model = small_model("llama")
    state = {name: tensor for name, tensor in model.state_dict().items() if "layers.1.mlp.up_proj" not in name}
    model.save_pretrained(tmp_path, state_dict=state)
    with pytest.raises(GraftError, match="lack 1 tensors .*layers.1.mlp.up_proj.weight"):
        load_model(BaseConfig(model=str(tmp_path), **CPU))


def test_a_hub_that_does_not_answer_is_an_error_that_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*args: object, **kwargs: object) -> None:
        raise OSError("We couldn't connect")

    monkeypatch.setattr(AutoConfig, "from_pretrained", fails)
    with pytest.raises(GraftError, match="'someone/model' is not a folder here, and reading it from the hub failed"):
        load_model(BaseConfig(model="someone/model", **CPU))
    with pytest.raises(GraftError, match="Did you mean 'seedling'"):
        load_model(BaseConfig(model="seedlin", **CPU))


def test_the_seedling_comes_with_graft() -> None:
    base = load_base(BaseConfig(model="seedling", **CPU))
    assert type(base.model).__name__ == "LlamaForCausalLM"
    assert base.tokenizer.eos_token_id is not None and base.tokenizer.chat_template


def test_a_model_with_code_of_its_own_needs_permission(folder: Path, tmp_path: Path) -> None:
    import json

    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "own_kind", "auto_map": {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.Own"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(GraftError, match="trust_remote_code: true"):
        load_model(BaseConfig(model=str(tmp_path), **CPU))


def test_a_gpu_that_is_not_there_is_refused_with_what_is(folder: Path) -> None:
    with pytest.raises(GraftError, match="no device 'cuda:77'; it has cpu"):
        load_model(BaseConfig(model=str(folder), device="cuda:77"))


def test_the_memory_report_counts_what_the_formula_gives_and_names_tied_weights() -> None:
    model = small_model("llama", tie_word_embeddings=True)
    layer = 2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 48 + 2 * 32
    expected = 258 * 32 + 2 * layer + 32
    graft.attach(model, {"math": graft.LoRA(rank=2)})
    report = memory_report(model)
    assert report.parameters == expected
    assert report.by_dtype["float32"] == report.num_bytes >= 4 * expected
    assert ("model.embed_tokens.weight", "lm_head.weight") in report.tied

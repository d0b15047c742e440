"""A base that is quantised and cut block by block is the base that is quantised as a whole, to the last bit."""

from __future__ import annotations

import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import distributed as dist
from torch.distributed import HashStore  # pyright: ignore[reportPrivateImportUsage]
from transformers import AutoModelForCausalLM

from graft.bases import load_base, parts
from graft.bases.memory import memory_report
from graft.bases.parts import load_in_parts
from graft.bases.quantised import quantised
from graft.config.base import BaseConfig
from tests.small import save_small

BITS: list[dict[str, Any]] = [
    {},
    {"quantize": "nf4"},
    {"quantize": "nf4", "double_quant": False, "skip": ["mlp.up"]},
    {"quantize": "fp4"},
    {"quantize": "int8"},
]


@pytest.fixture(scope="module")
def narrow(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base whose files are in bfloat16."""
    if not dist.is_initialized():
        dist.init_process_group("gloo", store=HashStore(), rank=0, world_size=1)
    folder = tmp_path_factory.mktemp("bases") / "narrow"
    save_small(folder)
    AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("settings", BITS, ids=lambda settings: "-".join(map(str, settings.values())) or "dense")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_base_in_parts_is_the_whole_one(narrow: Path, dtype: str, settings: dict[str, Any]) -> None:
    if settings:
        pytest.importorskip("bitsandbytes", reason="needs bitsandbytes (pip install 'graft-llm[quant]')")
    config = BaseConfig.model_validate({"model": str(narrow), "dtype": dtype, "device": "cpu", **settings})
    whole, in_parts = load_base(config), load_in_parts(config, "causal", 1)
    assert in_parts.identity == whole.identity and in_parts.identity["digest"] is not None
    assert str(quantised(in_parts.model)) == str(quantised(whole.model))
    if dtype == "bfloat16":  # the format of the files; in float32 blocks in parts are narrower
        assert memory_report(in_parts.model).num_bytes == memory_report(whole.model).num_bytes
    ids = torch.arange(3, 20)[None]
    with torch.no_grad():
        assert torch.equal(in_parts.model(ids).logits, whole.model(ids).logits)


@pytest.mark.parametrize("bits", ["nf4", "int8"])
def test_a_base_that_comes_quantised_is_not_read_whole(narrow: Path, bits: str, tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes", reason="needs bitsandbytes (pip install 'graft-llm[quant]')")
    made = load_base(BaseConfig.model_validate({"model": str(narrow), "quantize": bits, "device": "cpu"}))
    made.model.save_pretrained(tmp_path)
    made.tokenizer.save_pretrained(tmp_path)
    whole, in_parts = load_base(str(tmp_path)), load_in_parts(BaseConfig(model=str(tmp_path)), "causal", 1)
    assert in_parts.identity == whole.identity and in_parts.identity["digest"] is not None
    assert str(quantised(in_parts.model)) == str(quantised(whole.model)) == str(quantised(made.model))
    ids = torch.arange(3, 20)[None]
    with torch.no_grad():
        assert torch.equal(in_parts.model(ids).logits, whole.model(ids).logits)


def test_no_two_blocks_are_whole_in_bits_at_once(narrow: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("bitsandbytes", reason="needs bitsandbytes (pip install 'graft-llm[quant]')")
    weights, most, plain = weakref.WeakSet[Any](), [0], parts.quantise_layer

    def noted(model: Any, path: str, *given: Any) -> None:
        plain(model, path, *given)
        weights.add(model.get_submodule(path).weight.untyped_storage())
        most[0] = max(most[0], len(weights))

    monkeypatch.setattr(parts, "quantise_layer", noted)
    load_in_parts(BaseConfig.model_validate({"model": str(narrow), "quantize": "nf4", "device": "cpu"}), "causal", 1)
    assert most[0] == 7  # the linear layers of one block

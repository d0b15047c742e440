"""Adapters on bases in 4 and 8 bits: each is written as it would be on a base in floating point, in every state, or refused by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import graft
from tests.contract.table import base, ids, logits, randomise
from tests.formats.test_export_states import WRITTEN, contents

bnb = pytest.importorskip("bitsandbytes", reason="needs bitsandbytes (pip install 'graft-llm[quant]')")
pytestmark = pytest.mark.filterwarnings("ignore:MatMul8bitLt")
READS_WEIGHTS = {"dora", "dora as SVD", "ia3 as SVD", "hira", "hub dora"}
"""What is written from the weights of the base too: equal but for rounding."""


def quantised(family: str, bits: int) -> tuple[Any, Any]:
    """A tiny base whose linear layers in blocks are layers of bitsandbytes, and one that holds what these dequantise to."""
    model, plain = base(family), base(family)
    for path, old in [*model.named_modules()]:
        if type(old) is not nn.Linear or "lm_head" in path:
            continue
        sizes, bias = (old.in_features, old.out_features), old.bias
        if bits == 4:
            new = bnb.nn.Linear4bit(*sizes, bias=bias is not None, quant_type="nf4", compute_dtype=torch.float32)
            new.weight = bnb.nn.Params4bit(old.weight.data.clone(), requires_grad=False, quant_type="nf4", module=new)
        else:
            new = bnb.nn.Linear8bitLt(*sizes, bias=bias is not None, has_fp16_weights=False)
            new.weight = bnb.nn.Int8Params(old.weight.data.clone(), requires_grad=False, has_fp16_weights=False)
        new.bias = None if bias is None else nn.Parameter(bias.data.clone(), requires_grad=False)
        parent, _, name = path.rpartition(".")
        setattr(model.get_submodule(parent), name, new.to("cpu"))
        weight = new.weight
        numbers = (
            bnb.functional.dequantize_4bit(weight.data, weight.quant_state)
            if bits == 4
            else bnb.functional.int8_vectorwise_dequant(weight.data, weight.SCB)
        )
        plain.get_submodule(path).weight.data.copy_(numbers)
    return model.eval(), plain


def products(file: Path) -> dict[str, torch.Tensor]:
    """What a file of low-rank factors says: their products, since close singular values leave the factors themselves open."""
    tensors = load_file(file)
    found = {name: tensors[name.replace("lora_A", "lora_B")] @ A for name, A in tensors.items() if "lora_A" in name}
    return found | {name: each for name, each in tensors.items() if "lora_A" not in name and "lora_B" not in name}


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("case", WRITTEN)
def test_a_folder_is_that_of_a_base_in_floating_point(case: str, bits: int, tmp_path: Path) -> None:
    family, spec, options = WRITTEN[case]
    model, plain = quantised(family, bits)
    graft.attach(model, {"a": spec})
    graft.attach(plain, {"a": spec})
    randomise(model, "a", 0)
    own = dict(graft.parameters(model, "a"))
    with torch.no_grad():
        for name, parameter in graft.parameters(plain, "a"):
            parameter.copy_(own[name])
    notes = graft.export(plain, "a", tmp_path / "plain", **options)
    logits(model, ids())  # a layer may hold its weight otherwise once it has run
    assert graft.export(model, "a", tmp_path / "alone", **options) == notes
    graft.attach(model, {"b": graft.LoRA(rank=3, sites="attn.o")})
    assert graft.export(model, "a", tmp_path / "beside", **options) == notes
    if family != "gpt2":  # its layers are no nn.Linear, and stay as they are here
        for name in "ab":
            with pytest.raises(graft.GraftError, match="has quantised weights, which cannot take an adapter in"):
                graft.merge(model, name)
        assert graft.export(model, "a", tmp_path / "refused", **options) == notes
    wanted = contents(tmp_path / "plain")
    for folder in tmp_path.iterdir():
        found = contents(folder)
        assert found.keys() == wanted.keys()
        for name in wanted:
            if name.endswith(".safetensors"):
                near = {"rtol": 1e-4, "atol": 1e-5} if case in READS_WEIGHTS else {"rtol": 0.0, "atol": 0.0}
                read = products if "SVD" in case else load_file
                torch.testing.assert_close(read(folder / name), read(tmp_path / "plain" / name), **near)
            else:
                assert found[name] == wanted[name] or name.endswith(".bin"), (folder, name)


@pytest.mark.parametrize("bits", [4, 8])
def test_peft_on_the_same_quantised_base_computes_the_same(bits: int, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    model, _ = quantised("llama", bits)
    graft.attach(model, {"a": graft.LoRA(rank=2, sites="attn.q attn.v mlp.down")})
    randomise(model, "a", 0)
    graft.export(model, "a", tmp_path / "a")
    other, _ = quantised("llama", bits)
    setattr(other, f"is_loaded_in_{bits}bit", True)  # as transformers marks a base that it loads quantised
    for module in other.modules():
        if hasattr(
            module, "support_avx512bf16_for_cpu"
        ):  # bitsandbytes packs no layer that is narrower than its blocks
            module.support_avx512bf16_for_cpu = False
    found = logits(peft.PeftModel.from_pretrained(other, tmp_path / "a").eval(), ids())
    torch.testing.assert_close(found, logits(model, ids()), atol=1e-4, rtol=1e-4)

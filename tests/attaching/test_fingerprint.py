"""The fingerprint of a base sees a change of any tensor and of any row, and the same file has one digest in every dtype."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import graft
from graft.attaching.fingerprint import fingerprint, other_base
from tests.small import small_model


def digest(model: nn.Module) -> str:
    found = fingerprint(model)["digest"]
    assert found
    return found


def rule_of_before(model: nn.Module) -> str:
    """The digest that adapters of earlier releases hold: 64 values of about sixteen tensors."""
    named, hasher = list(model.named_parameters()), hashlib.sha256()
    for name, parameter in named[:: max(1, len(named) // 16)]:
        values = parameter.detach().flatten()[:64].to(torch.bfloat16)
        hasher.update(name.encode() + values.view(torch.int16).numpy().tobytes())
    return hasher.hexdigest()[:16]


@pytest.mark.parametrize("family", ["llama", "gpt2", "bloom"])
def test_a_change_of_any_tensor_is_seen(family: str) -> None:
    # Nine tensors per layer, as in every LLaMA, were sampled at one norm only.
    model = small_model(family, num_hidden_layers=8 if family == "llama" else 4)
    before = digest(model)
    for name, parameter in model.named_parameters():
        kept = parameter.detach().clone()
        with torch.no_grad():
            parameter.copy_(torch.randn(parameter.shape))
        assert digest(model) != before, name
        with torch.no_grad():
            parameter.copy_(kept)
    assert digest(model) == before


def test_a_change_of_two_rows_of_any_table_is_seen() -> None:
    model = small_model()
    before = digest(model)
    for name, parameter in model.named_parameters():
        for row in range(0, len(parameter) - 1, 7) if parameter.dim() > 1 else ():
            kept = parameter.detach().clone()
            with torch.no_grad():
                parameter[row : row + 2] += 1
            assert digest(model) != before, (name, row)
            with torch.no_grad():
                parameter.copy_(kept)


@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float16, torch.float32])
def test_one_file_has_one_digest_in_every_dtype_that_holds_it(stored: torch.dtype) -> None:
    model = small_model(scale=0.02).to(stored)  # many values are below what float16 holds exactly
    loaded_as = {torch.bfloat16: [torch.float16, torch.float32, torch.float64]}.get(stored, [torch.float32])
    loaded_as = [torch.float32, torch.bfloat16] if stored == torch.float16 else [*loaded_as, torch.bfloat16]
    assert len({digest(small_model(scale=0.02).to(stored).to(dtype)) for dtype in loaded_as} | {digest(model)}) == 1


def test_weights_that_cannot_be_read_have_no_digest_and_are_not_compared() -> None:
    recorded = fingerprint(small_model())
    model = small_model().to("meta")
    assert fingerprint(model)["digest"] is None and other_base(recorded, model) is None
    sharded = small_model()
    sharded.model.layers[0].mlp.up_proj.weight.data = torch.empty(0)  # what DeepSpeed leaves of a partitioned weight
    assert "unknown" in str(fingerprint(sharded)["digest"]) and other_base(recorded, sharded) is None
    assert other_base(recorded, small_model(scale=4)) is not None


def test_an_adapter_with_a_digest_of_before_is_compared_by_the_rule_of_before(tmp_path: Path) -> None:
    model = small_model()
    recorded = rule_of_before(model)
    graft.attach(model, {"a": graft.LoRA(rank=1)})
    folder = graft.save(model, "a", tmp_path / "a")
    header = json.loads((folder / "adapter_config.json").read_text())
    assert header["base"]["digest"] != recorded
    header["base"]["digest"] = recorded
    (folder / "adapter_config.json").write_text(json.dumps(header))
    graft.load(small_model(), folder)
    with pytest.raises(graft.GraftError, match="has other weights"):
        graft.load(small_model(scale=4), folder)


def test_an_adapter_is_not_loaded_in_silence_on_a_base_with_other_linear_weights(tmp_path: Path) -> None:
    model = small_model(num_hidden_layers=32)
    graft.attach(model, {"a": graft.LoRA(rank=1)})
    folder = graft.save(model, "a", tmp_path / "a")
    other = small_model(num_hidden_layers=32)
    assert rule_of_before(small_model(num_hidden_layers=32)) == rule_of_before(other)
    with torch.no_grad():
        for layer in other.model.layers:
            layer.mlp.down_proj.weight.normal_()
    with pytest.raises(graft.GraftError, match="has other weights .*any_base=True"):
        graft.load(other, folder)
    graft.load(other, folder, any_base=True)


def test_rows_that_an_adapter_replaces_do_not_count(tmp_path: Path) -> None:
    model = small_model()
    graft.attach(model, {"a": graft.Full(sites="embed head", tokens=(250, 257))})
    folder = graft.save(model, "a", tmp_path / "a")

    def extended_again(row: int) -> Any:
        other = small_model()
        with torch.no_grad():
            for table in (other.model.embed_tokens, other.lm_head):
                table.weight[row].normal_()
        return other

    graft.load(extended_again(257), folder)
    with pytest.raises(graft.GraftError, match="has other weights"):
        graft.load(extended_again(100), folder)


def test_packed_weights_and_their_scales_count_and_a_base_in_four_bits_fits_the_same_base_in_full() -> None:
    bnb = pytest.importorskip("bitsandbytes", reason="needs bitsandbytes (pip install 'graft-llm[quant]')")

    def packed(scale: float = 8.0) -> Any:
        model = small_model(scale=scale, hidden_size=64, intermediate_size=128)
        for module in list(model.model.layers.modules()):
            for name, child in list(module.named_children()):
                if type(child) is nn.Linear:
                    layer = bnb.nn.Linear4bit(child.in_features, child.out_features, bias=False, quant_type="nf4")
                    layer.weight = bnb.nn.Params4bit(
                        child.weight.data, requires_grad=False, quant_type="nf4", module=layer
                    )
                    setattr(module, name, layer.to("cpu"))
        return model

    model = packed()
    recorded = fingerprint(model)
    assert "unknown" not in recorded["digest"] and recorded["quantised"].startswith("nf4/")
    assert other_base(recorded, packed()) is None
    full = small_model(hidden_size=64, intermediate_size=128)
    assert other_base(recorded, full) is None and other_base(fingerprint(full), model) is None
    up = model.model.layers[1].mlp.up_proj.weight
    up.data.bitwise_xor_(1)
    assert other_base(recorded, model) is not None
    up.data.bitwise_xor_(1)
    assert other_base(recorded, model) is None
    scales = up.quant_state
    (scales.absmax if scales.state2 is None else scales.state2.absmax).mul_(2)
    assert other_base(recorded, model) is not None
    with torch.no_grad():
        full.model.embed_tokens.weight[3:5] = 0
    assert other_base(recorded, full) is not None

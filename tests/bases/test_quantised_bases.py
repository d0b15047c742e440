"""Bases in few bits: quantised while they load, what stays as it is, what is said about it, and checkpoints that come quantised."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

import graft
from graft.attaching.fingerprint import fingerprint, other_base
from graft.bases import load_base, load_model, memory_report
from graft.bases.quantised import quantised
from graft.config.base import BaseConfig
from graft.errors import GraftError, MissingExtra
from graft.ops.packed import dequantised
from graft.testing.case import randomise
from tests.small import save_small, small_tokenizer
from tests.task_bases import save_task_base

bnb = pytest.importorskip("bitsandbytes", reason="needs bitsandbytes (pip install 'graft-llm[quant]')")
IDS = torch.arange(2, 14).view(2, 6)


def config(folder: Path, quantize: str | None = "nf4", **changes: Any) -> BaseConfig:
    return BaseConfig.model_validate({"model": str(folder), "device": "cpu", "quantize": quantize, **changes})


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Wide enough for whole blocks of 64 in each row, where bitsandbytes packs on some CPUs."""
    return save_small(tmp_path_factory.mktemp("bases") / "llama", hidden_size=64, intermediate_size=128)


def layers(model: nn.Module) -> dict[str, Any]:
    return {
        path: each for path, each in model.named_modules() if isinstance(each, bnb.nn.Linear4bit | bnb.nn.Linear8bitLt)
    }


@pytest.mark.parametrize("bits", ["nf4", "fp4", "int8"])
def test_each_layer_holds_what_bitsandbytes_makes_of_its_weight(folder: Path, bits: str) -> None:
    model, plain = load_model(config(folder, bits)), load_model(config(folder, None))
    assert set(layers(model)) == {path for path, each in plain.named_modules() if type(each) is nn.Linear} - {"lm_head"}
    for path, layer in layers(model).items():
        weight = plain.get_submodule(path).weight
        if bits == "int8":
            codes, scales, _ = bnb.functional.int8_vectorwise_quant(weight.half())
            wanted = codes.float() * scales[:, None] / 127
        else:
            packed, state = bnb.functional.quantize_4bit(weight, quant_type=bits, compress_statistics=True)
            wanted = bnb.functional.dequantize_4bit(packed, state)
        found = dequantised(layer)
        assert found is not None
        torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-7)
        x = torch.randn(3, weight.shape[1])
        torch.testing.assert_close(layer(x), F.linear(x, wanted), rtol=1e-4, atol=1e-5)
    assert torch.equal(model.lm_head.weight, plain.lm_head.weight)


def test_the_bits_per_parameter_are_those_that_the_format_gives(folder: Path) -> None:
    # Codes, a byte for each block of 64, a float for each 256 of these, and tables of 16 and 256 floats with an offset.
    model = load_model(config(folder))
    sizes = [math.prod(layer.weight.quant_state.shape) for layer in layers(model).values()]
    formula = sum(n // 2 + n // 64 + 4 * math.ceil(n / 64 / 256) + 4 * (16 + 256 + 1) for n in sizes)
    found = quantised(model)
    assert found is not None and (found.parameters, found.num_bytes) == (sum(sizes), formula)
    large = 2048 * 2048
    layer = bnb.nn.Linear4bit(2048, 2048, bias=False, quant_type="nf4").to("cpu")
    found = quantised(nn.Sequential(layer))
    assert found is not None and found.bits == pytest.approx(4.127 + 8 * 4 * 273 / large, abs=5e-4)
    assert str(found).startswith("1 linear layer in nf4 with double quantisation, 4.129 bits per parameter")
    model_8 = load_model(config(folder, "int8"))
    eight = quantised(model_8)
    assert eight is not None and eight.num_bytes == sum(sizes) + 4 * sum(
        len(w.weight) for w in layers(model_8).values()
    )
    single = quantised(load_model(config(folder, double_quant=False)))
    assert single is not None and single.num_bytes == sum(n // 2 + 4 * n // 64 + 4 * 16 for n in sizes)
    assert single.method == "nf4" and single.kept == {"model.embed_tokens": 258 * 64, "lm_head": 258 * 64}
    report = memory_report(model)
    assert report.parameters == memory_report(load_model(config(folder, None))).parameters
    assert report.num_bytes >= formula + 2 * 258 * 64 * 4


@pytest.mark.parametrize("bits", ["nf4", "int8"])
def test_gradients_are_the_same_before_and_after_an_evaluation(folder: Path, bits: str) -> None:
    """On a CPU with AVX512-BF16 bitsandbytes would pack 4-bit weights in the evaluation, and drop the gradients of their inputs."""
    model = load_model(config(folder, bits))
    with torch.no_grad():
        model(IDS)  # before anything is attached
    graft.attach(model, {"a": graft.LoRA(rank=4, sites="linear")})
    randomise(model, "a", size=0.1)

    def learned() -> list[Tensor]:
        model.zero_grad()
        model.train()(IDS, use_cache=False).logits.square().mean().backward()
        return [p.grad.clone() for _, p in graft.parameters(model, "a")]

    first = learned()
    with torch.no_grad():
        evaluated = model.eval()(IDS).logits
    assert all(torch.equal(*pair) for pair in zip(learned(), first, strict=True))
    assert torch.equal(model.eval()(IDS).logits, evaluated)
    graft.detach(model)
    with torch.no_grad():
        model(IDS)
    graft.attach(model, {"b": graft.LoRA(rank=4)})  # nothing was packed meanwhile


def test_a_token_gets_the_same_whatever_is_beside_it(folder: Path) -> None:
    """LLM.int8() chooses the features that it does not round by the values of all tokens of a batch."""
    model = load_model(config(folder, "int8"))
    layer = next(iter(layers(model).values()))
    x = torch.randn(4, 64)
    loud = torch.cat([x, 100 * torch.randn(2, 64)])
    assert torch.equal(layer(loud)[:4], layer(x)) and torch.equal(layer.train()(x), layer.eval()(x))
    own = bnb.nn.Linear8bitLt(64, 64, bias=False, has_fp16_weights=False, threshold=6.0)
    own.weight = bnb.nn.Int8Params(torch.randn(64, 64), has_fp16_weights=False, requires_grad=False)
    own = own.to("cpu").eval()
    assert not torch.allclose(own(loud)[:4], own(x), atol=1e-3)


def test_skip_takes_names_of_sites_and_paths(folder: Path) -> None:
    everything = set(layers(load_model(config(folder, skip=[]))))
    assert "lm_head" in everything and len(everything) == 15
    for skip, kept in {
        "head": {"lm_head"},
        "attn.q@1": {"model.layers.1.self_attn.q_proj"},
        "model.layers.0.mlp": {f"model.layers.0.mlp.{name}_proj" for name in ("gate", "up", "down")},
        "re:.*v_proj": {f"model.layers.{number}.self_attn.v_proj" for number in (0, 1)},
        "embed": set(),  # is a table, which is never quantised
    }.items():
        assert everything - set(layers(load_model(config(folder, skip=[skip])))) == kept, skip
    model = load_model(config(folder, skip="head mlp.down"))
    graft.attach(model, {"a": graft.DoRA(rank=2, sites="attn.q mlp.down head")})
    found = quantised(model)
    assert found is not None and found.kept_note == (
        "not quantised: model.embed_tokens (16,512 parameters), model.layers.*.mlp.down_proj (16,384 parameters), "
        "lm_head (16,512 parameters)"
    )


@pytest.mark.parametrize(
    ("skip", "message"),
    [
        (
            "attn.qq",
            r"^base.skip: site 'attn.qq' matches nothing in this model. Did you mean 'attn.q'\? This model has: attn",
        ),
        (
            "mlp",
            r"^base.skip: 'mlp' is a sublayer: name its linear layers \(attn.q, mlp.up, ...\) or the path of a module",
        ),
        ("model.layers.7", "^base.skip: there is no module 'model.layers.7' in this model. Did you mean 'model.layers"),
    ],
)
def test_a_name_in_skip_that_meets_nothing_is_an_error_with_what_there_is(
    folder: Path, skip: str, message: str
) -> None:
    with pytest.raises(GraftError, match=message):
        load_model(config(folder, skip=[skip]))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"quantize": None, "double_quant": True}, "double_quant has no effect without base.quantize"),
        ({"quantize": None, "compute": "bfloat16"}, "compute has no effect without base.quantize"),
        ({"quantize": None, "skip": ["head"]}, "skip has no effect without base.quantize"),
        ({"quantize": "int8", "double_quant": False}, "double_quant has no effect with base.quantize: int8"),
        ({"quantize": "int8", "compute": "float32"}, "compute has no effect with base.quantize: int8"),
        ({"quantize": "nf3"}, "nf4"),
    ],
)
def test_a_setting_without_effect_is_an_error(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        BaseConfig.model_validate({"model": "seedling", **changes})


def test_without_bitsandbytes_the_error_names_the_extra(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(MissingExtra, match=r"pip install 'graft-llm\[quant\]'"):
        load_model(config(folder))


@pytest.mark.parametrize("bits", ["nf4", "int8"])
@pytest.mark.parametrize("family", ["bert", "roberta", "distilbert", "deberta-v2", "gpt2", "t5"])
def test_a_fresh_head_is_not_quantised(family: str, bits: str, tmp_path: Path) -> None:
    base = load_base(config(save_task_base(tmp_path, family), bits), "classification", ("yes", "no", "perhaps"))
    assert base.fresh and len(layers(base.model)) >= 8
    for path in base.fresh:
        layer = base.model.get_submodule(path)
        assert type(layer) is nn.Linear and layer.weight.dtype == torch.float32 and layer.weight.any(), path
    plain = load_base(config(tmp_path, None), "classification", ("yes", "no", "perhaps"))
    assert base.fresh == plain.fresh
    for path in base.fresh:
        assert torch.equal(base.model.get_submodule(path).weight, plain.model.get_submodule(path).weight)


def test_a_head_that_shares_the_table_is_never_quantised(tmp_path: Path) -> None:
    save_small(tmp_path, "gpt2", tie_word_embeddings=True)
    model = load_model(config(tmp_path, skip=[]))
    assert model.lm_head.weight is model.transformer.wte.weight and len(layers(model)) == 8


def test_transposed_layers_are_quantised_and_named_like_others(tmp_path: Path) -> None:
    model, plain = load_model(config(save_small(tmp_path, "gpt2"), "int8")), load_model(config(tmp_path, None))
    for path, layer in layers(model).items():
        found = dequantised(layer)
        assert found is not None
        torch.testing.assert_close(found.t(), plain.get_submodule(path).weight, rtol=0, atol=0.05)
    graft.attach(model, {"a": [graft.DoRA(rank=2, sites="attn.q attn.v"), graft.LoRA(rank=2, sites="mlp.up")]})


def test_compute_is_the_dtype_of_the_layers_and_the_base_stays_as_it_was_loaded(tmp_path: Path) -> None:
    base = load_base(config(save_small(tmp_path, "gpt2"), compute="bfloat16"))
    before = {name: tensor.clone() for name, tensor in base.model.state_dict().items()}
    found = quantised(base.model)
    assert base.dtype == torch.float32 and found is not None and found.compute == "bfloat16"
    base.model(IDS)
    assert all(
        tensor.dtype == before[name].dtype and torch.equal(tensor, before[name])
        for name, tensor in base.model.state_dict().items()
    )


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("bits", ["nf4", "fp4", "int8"])
def test_a_checkpoint_that_comes_quantised_is_recognised(family: str, bits: str, tmp_path: Path) -> None:
    single = {} if bits == "int8" else {"double_quant": bits == "nf4"}
    model = load_model(config(save_small(tmp_path / "base", family), bits, **single))
    model.save_pretrained(tmp_path / "saved")
    small_tokenizer().save_pretrained(tmp_path / "saved")
    again = load_model(config(tmp_path / "saved", None))
    assert quantised(again) == quantised(model)
    assert torch.equal(again(IDS).logits, model(IDS).logits)
    assert other_base(fingerprint(model), again) is None
    with pytest.raises(
        GraftError, match=r"^base.quantize: '.*saved' comes quantised already \(bitsandbytes\): remove base.quantize"
    ):
        load_model(config(tmp_path / "saved"))


def in_float8(weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Codes, a scale for each tile of 128 x 128, and the numbers that they stand for."""
    rows, columns = (math.ceil(size / 128) for size in weight.shape)
    scales = torch.rand(rows, columns) + 1
    spread = scales.repeat_interleave(128, 0)[: weight.shape[0]].repeat_interleave(128, 1)[:, : weight.shape[1]]
    codes = (weight / spread).to(torch.float8_e4m3fn)
    return codes, scales, codes.float() * spread


def test_weights_in_float8_are_dequantised() -> None:
    layer: Any = nn.Linear(200, 130, bias=False)
    codes, scales, wanted = in_float8(layer.weight.data)
    layer.weight, layer.weight_scale_inv = nn.Parameter(codes, False), nn.Parameter(scales, False)
    layer.block_size = (128, 128)
    found = dequantised(layer, torch.float32)
    assert found is not None and torch.equal(found, wanted)
    held = quantised(nn.Sequential(layer))
    assert held is not None and held.method == "float8_e4m3fn" and held.num_bytes == 200 * 130 + 4 * 4


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU may compute with weights in float8")
def test_float8_weights_that_a_cpu_cannot_compute_with_are_dequantised_with_a_word(tmp_path: Path) -> None:
    save_small(tmp_path, hidden_size=64, intermediate_size=256)
    plain, held = load_file(tmp_path / "model.safetensors"), {}
    for name, weight in plain.items():
        held[name] = weight
        if "_proj" in name:
            held[name], held[f"{name}_scale_inv"], plain[name] = in_float8(weight)
    save_file(held, tmp_path / "model.safetensors", metadata={"format": "pt"})
    settings = json.loads((tmp_path / "config.json").read_text())
    settings["quantization_config"] = {
        "quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [128, 128]
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(settings))
    with pytest.warns(UserWarning, match=r"are quantised \(fp8\), and transformers dequantised them to float32"):
        model = load_model(config(tmp_path, None))
    for name, weight in plain.items():
        torch.testing.assert_close(model.state_dict()[name], weight, rtol=0.01, atol=1e-4)


class PackedElsewhere(nn.Module):
    """A layer of a library that keeps its weight to itself, as those of GPTQ and AWQ do."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.register_buffer("qweight", (weight * 16).to(torch.int32))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.qweight.to(x.dtype).t() / 16


def test_layers_that_cannot_be_dequantised_serve_kinds_that_only_call_them(folder: Path) -> None:
    model = load_model(config(folder, None))
    for block in model.model.layers:
        block.mlp.up_proj = PackedElsewhere(block.mlp.up_proj.weight.data)
    found = quantised(model)
    assert found is not None and found.method == "PackedElsewhere" and not found.reads and found.layers == 2
    assert fingerprint(model)["quantised"] == "Tensor/int32/cpu"
    graft.attach(model, {"a": graft.LoRA(rank=2, sites="mlp.up"), "b": graft.SHiRA(rank=2, sites="mlp.up")})
    for kind in (graft.DoRA(rank=2, sites="mlp.up"), graft.HiRA(rank=2, sites="mlp.up")):
        with pytest.raises(
            GraftError, match="reads the frozen weight, but PackedElsewhere has none .* cannot dequantise it"
        ):
            graft.attach(model, {"c": kind})


@pytest.mark.parametrize("bits", ["nf4", "int8"])
def test_full_training_of_a_module_with_quantised_layers_is_refused_by_name(folder: Path, bits: str) -> None:
    model = load_model(config(folder, bits))
    with pytest.raises(GraftError, match="weight' is quantised: full training needs it in a floating-point dtype"):
        graft.attach(model, {"a": graft.Full(sites="re:model.layers.0.mlp")})
    graft.attach(model, {"a": graft.Full(sites="head norm"), "b": graft.Full(sites="mlp.down")})  # differences beside


def test_an_adapter_knows_the_bits_of_its_base(folder: Path, tmp_path: Path) -> None:
    model = load_model(config(folder))
    graft.attach(model, {"a": graft.LoRA(rank=2)})
    saved = graft.save(model, "a", tmp_path / "a")
    other = save_small(tmp_path / "other", hidden_size=64, intermediate_size=128, scale=4.0)
    with pytest.raises(GraftError, match="this base has other weights"):
        graft.load(load_model(config(other)), saved)
    weights = load_file(folder / "model.safetensors")
    weights["model.layers.1.mlp.up_proj.weight"][3] *= -1  # all that is not quantised is the same
    changed = save_small(tmp_path / "changed", hidden_size=64, intermediate_size=128)
    save_file(weights, changed / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(GraftError, match="this base has other weights"):
        graft.load(load_model(config(changed)), saved)
    for again, there in ((config(folder, None), "floating-point numbers"), (config(folder, "int8"), "int8")):
        with pytest.warns(UserWarning, match=f"trained on this base in nf4, and here the base is in {there}: it works"):
            graft.load(load_model(again), saved)
    with pytest.warns(
        UserWarning, match="trained on this base in nf4 with other settings, in another dtype or on another device"
    ):
        graft.load(load_model(config(folder, double_quant=False)), saved)


def test_an_8_bit_base_has_one_digest_before_and_after_it_ran(folder: Path) -> None:
    model = load_model(config(folder, "int8"))
    before = fingerprint(model)
    model(IDS)
    assert fingerprint(model) == before and "unknown" not in before["digest"]
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    own = AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=BitsAndBytesConfig(load_in_8bit=True), dtype=torch.float32, device_map={"": "cpu"}
    )
    own(IDS)  # moves the scales away from the weights
    assert other_base(before, own) is None
    own.model.layers[0].mlp.up_proj.state.SCB[3] *= 2
    assert "other weights" in str(other_base(before, own))

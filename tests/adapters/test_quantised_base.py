"""bitsandbytes' 4-bit layers with LoRAs: one node that dequantises the weight for each use equals their own forward and backward."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import graft
from graft.attaching.active import running, set_trainable
from graft.injection import gated_mlp as gated_forward
from graft.ops.frozen_linear import FrozenLinear, frozen_linear
from graft.routing.context import ForwardContext
from tests.small import small_model

bnb = pytest.importorskip("bitsandbytes", reason="needs bitsandbytes (pip install 'graft-llm[quant]')")
PACKING = "support_avx512bf16_for_cpu"


def quantised_layer(dtype: torch.dtype, **settings: Any) -> Any:
    torch.manual_seed(0)
    layer = bnb.nn.Linear4bit(64, 96, quant_type="nf4", **settings)
    layer.weight = bnb.nn.Params4bit(
        torch.randn(96, 64, dtype=dtype) * 0.1, requires_grad=False, quant_type="nf4", module=layer,
        compress_statistics=settings.get("compress_statistics", True),
        quant_storage=settings.get("quant_storage", torch.uint8),
    )  # fmt: skip
    if layer.bias is not None:
        layer.bias = nn.Parameter(torch.randn(96, dtype=dtype), requires_grad=False)
    return layer.to("cpu")


def quantised_model(dtype: torch.dtype, dropout: float = 0.0) -> Any:
    """A small llama whose linear layers are held in four bits, with a LoRA on each."""
    model = small_model(scale=1.0, hidden_size=64, intermediate_size=128).to(dtype)
    for module in list(model.model.layers.modules()):
        for name, child in list(module.named_children()):
            if type(child) is nn.Linear:
                layer = bnb.nn.Linear4bit(child.in_features, child.out_features, bias=False, quant_type="nf4")
                layer.weight = bnb.nn.Params4bit(child.weight.data, requires_grad=False, quant_type="nf4", module=layer)
                setattr(module, name, layer.to("cpu"))
    graft.attach(model, {"a": graft.LoRA(rank=4, dropout=dropout, sites="linear")})
    set_trainable(model, ["a"])
    torch.manual_seed(1)
    with torch.no_grad():
        for _, parameter in graft.parameters(model, "a"):
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def learned(model: Any) -> list[Tensor]:
    model.zero_grad()
    with running(model, ForwardContext("a", (6, 6), False, (3, 4))):
        out = model(input_ids=torch.arange(2, 14).view(2, 6), use_cache=False).logits
        out.float().square().mean().backward()
    return [out.detach(), *(p.grad.clone() for _, p in graft.parameters(model, "a"))]


def test_the_layer_s_own_output_is_met_bit_for_bit() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        for settings in ({}, {"bias": False}, {"compress_statistics": False}, {"quant_storage": torch.bfloat16}):
            layer = quantised_layer(dtype, **settings).train()
            x = torch.randn(2, 5, 64, dtype=dtype).requires_grad_()
            found = frozen_linear(layer, x)
            assert found is not None
            assert torch.equal(found.output(x.detach()), layer(x))
            (wanted,) = torch.autograd.grad(layer(x), x, torch.ones(2, 5, 96, dtype=dtype))
            ours = torch.ones(2, 5, 96, dtype=dtype) @ found.weight(found.stored, dtype)
            assert torch.equal(ours, wanted)


def test_x_in_another_dtype_than_the_layer_computes_in_keeps_the_layer_s_own_forward() -> None:
    layer = quantised_layer(torch.float32, compute_dtype=torch.float32).train()
    x = torch.randn(2, 5, 64).requires_grad_()
    assert frozen_linear(layer, x) is not None
    assert frozen_linear(layer, x.bfloat16()) is None and frozen_linear(layer, x.double()) is None
    with torch.no_grad():
        assert frozen_linear(layer, x) is None


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("gated", [True, False])
def test_a_model_learns_as_by_the_layers_own_forward(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, dropout: float, gated: bool
) -> None:
    """As one node per MLP, or per layer."""
    model, dequantised = quantised_model(dtype, dropout).train(), []
    weight = FrozenLinear.weight
    monkeypatch.setattr(FrozenLinear, "weight", lambda *given: (dequantised.append(1), weight(*given))[1])
    if not gated:
        monkeypatch.setattr(gated_forward, "_run", lambda *given: None)
    found = learned(model)
    assert len(dequantised) == 2 * (7 + 7) - 3  # forward and backward; nothing is below q, k and v of the first block
    monkeypatch.setattr(gated_forward, "_run", lambda *given: None)
    monkeypatch.setattr("graft.injection.container.linear_low_rank", lambda host, x, terms: None)
    wanted = learned(model)
    near = {"rtol": 1e-4, "atol": 1e-7} if dtype == torch.float32 else {"rtol": 0.1, "atol": 1e-3}
    for own_, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(own_, other, **near)


@pytest.mark.skipif(
    not getattr(bnb.nn.Linear4bit(64, 64), PACKING, False),
    reason="needs a CPU with AVX512-BF16, where bitsandbytes packs",
)
def test_evaluation_before_training_changes_no_gradient_on_a_cpu_that_packs_weights() -> None:
    model = quantised_model(torch.float32)
    first = learned(model.train())
    with torch.no_grad():
        model.eval()(input_ids=torch.arange(2, 14).view(2, 6), use_cache=False)
    for own, other in zip(learned(model.train()), first, strict=True):
        assert torch.equal(own, other)


def test_layers_are_given_their_packing_back_and_packed_ones_are_refused() -> None:
    model = quantised_model(torch.float32)
    layers = [module for module in model.modules() if isinstance(module, bnb.nn.Linear4bit)]
    before = getattr(bnb.nn.Linear4bit(64, 64), PACKING)
    assert not any(getattr(layer, PACKING) for layer in layers)
    graft.detach(model)
    assert all(getattr(layer, PACKING) == before and "graft_packs" not in layer.__dict__ for layer in layers)
    layers[3].weight.quant_state.packing_format_for_cpu = True
    with pytest.raises(graft.GraftError, match="was packed by bitsandbytes"):
        graft.attach(model, {"a": graft.LoRA(rank=4)})
    assert not any(hasattr(module, "graft_state") for module in model.modules())


def dequantised(model: Any) -> Any:
    """The same model with the numbers of its quantised weights."""
    plain = small_model(scale=1.0, hidden_size=64, intermediate_size=128)
    for path, layer in model.named_modules():
        if isinstance(layer, bnb.nn.Linear4bit):
            weight = bnb.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)
            plain.get_submodule(path).weight.data.copy_(weight)
    return plain


READERS = {
    "dora": graft.DoRA(rank=4, sites="linear"),
    "pissa": graft.PiSSA(rank=4),
    "hira": graft.HiRA(rank=2),
    "miss-bat": graft.MiSS(rank=8, variant="bat"),
    "head": graft.Head(sites="mlp.down"),
}
"""Kinds that read the frozen weight: they get it dequantised."""


@pytest.mark.parametrize(
    "spec",
    [*READERS.values(), graft.MiSS(rank=12), graft.SHiRA(rank=4), graft.OFT(block_size=16), graft.OFT(terms=None)],
    ids=[*READERS, "miss", "shira", "oft", "oft-exact"],
)
def test_every_kind_learns_as_on_the_dequantised_base(spec: Any) -> None:
    model = quantised_model(torch.float32)
    graft.detach(model)
    found = []
    for each in (model, dequantised(model)):
        torch.manual_seed(2)
        graft.attach(each, {"a": spec})
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for _, parameter in graft.parameters(each, "a"):
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
        found.append(learned(each.train()))
    for own, other in zip(*found, strict=True):
        torch.testing.assert_close(own, other, rtol=1e-5, atol=1e-7)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_on_a_gpu_the_layer_s_own_output_and_gradient_are_met_within_rounding(dtype: torch.dtype) -> None:
    layer = quantised_layer(dtype).cuda().train()
    x = torch.randn(2, 300, 64, dtype=dtype, device="cuda").requires_grad_()
    found = frozen_linear(layer, x)
    assert found is not None
    exact = x.detach().double() @ found.weight(found.stored, dtype).double().t() + layer.bias.double()
    rounding = {"rtol": 1e-5, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 1e-2, "atol": 1e-2}
    torch.testing.assert_close(found.output(x.detach()).double(), exact, **rounding)
    torch.testing.assert_close(layer(x).double(), exact, **rounding)

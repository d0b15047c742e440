"""(IA)3, BitFit, Hadamard and LLaMA-Adapter v2: their equations written out, PEFT, AdapterHub, and ordinary training of biases."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import graft
from graft.adapters.base import CannotFold
from tests.adapters.oracle import case, fill
from tests.adapters.references import Twins
from tests.adapters.test_full import steps
from tests.contract.table import base, ids, logits, randomise, same_base

DENSE = {"inputs": ("attn.o", "mlp.down"), "sites": "attn.k attn.v attn.o mlp.down"}
"""PEFT's pattern `output.dense` of BERT means the attention's output too."""


@pytest.mark.parametrize(
    ("family", "ours", "targets", "feedforward"),
    [
        ("llama", graft.IA3(), ["k_proj", "v_proj", "down_proj"], ["down_proj"]),
        ("gpt2", graft.IA3(sites="attn.qkv mlp.down"), ["c_attn", "mlp.c_proj"], ["mlp.c_proj"]),
        ("bloom", graft.IA3(sites="attn.qkv mlp.down"), ["query_key_value", "dense_4h_to_h"], ["dense_4h_to_h"]),
        ("t5", graft.IA3(), ["k", "v", "wo"], ["wo"]),
        ("bert", graft.IA3(**DENSE), ["key", "value", "output.dense"], ["output.dense"]),
    ],
)  # fmt: skip
def test_ia3_and_its_gradients_equal_peft(
    family: str, ours: graft.IA3, targets: list[str], feedforward: list[str]
) -> None:
    peft = pytest.importorskip("peft")
    settings = {"target_modules": targets, "feedforward_modules": feedforward, "fan_in_fan_out": family == "gpt2"}
    Twins(family, ours, peft.IA3Config(**settings), {"scale": "ia3_l.default"}).assert_same()


PEFTS = {
    "llama-ia3": {},
    "llama-ia3-custom": {"inputs": ("mlp.down",), "sites": "attn.q attn.o mlp.up mlp.down"},
    "bloom-ia3": {"sites": "attn.qkv mlp.down"},
    "gpt2-ia3": {"sites": "attn.qkv mlp.down"},
    "bert-ia3": DENSE,
}


@pytest.mark.parametrize("name", PEFTS)
def test_an_ia3_checkpoint_of_peft_gives_its_outputs(shared: Path, name: str) -> None:
    reference = case(shared, f"peft/{name}")
    model, stored = reference.base(), reference.tensors()
    if name == "bert-ia3":
        graft.attach(model, {"a": [graft.IA3(**PEFTS[name]), graft.Full(sites="re:classifier", train_bias=True)]})
    else:
        graft.attach(model, {"a": graft.IA3(**PEFTS[name])})
    frozen = dict(model.named_parameters())
    fill(model, "a", {
        key.replace(".ia3_l", ".linear.scale") if key.endswith("ia3_l") else key.replace("classifier", "classifier.linear"):
        value.flatten() if key.endswith("ia3_l") else value - frozen[key]
        for key, value in stored.items()
    })  # fmt: skip
    reference.assert_agrees(model)


HUB = {"bert-ia3": "mlp.up", "gpt2-ia3": "mlp.up", "llama-ia3": "mlp.down", "t5-ia3": "mlp.up"}


@pytest.mark.parametrize("name", HUB)
def test_an_ia3_checkpoint_of_adapterhub_which_scales_outputs_gives_its_outputs(shared: Path, name: str) -> None:
    """On GPT-2 one vector holds the factors of keys and of values, which are two slices of one projection."""
    reference = case(shared, f"adapters/{name}")
    model = reference.base()
    graft.attach(model, {"a": graft.IA3(inputs=(), sites=f"attn.k attn.v cross.k? cross.v? {HUB[name]}")})
    values = {}
    for key, value in reference.tensors().items():
        path = key.removesuffix(".loras.fx.lora_B").removeprefix("bert.")
        if path.endswith("c_attn"):
            values |= {f"{path}.{part}.scale": half for part, half in zip("kv", value.flatten().chunk(2), strict=True)}
        else:
            values[f"{path}.linear.scale"] = value.flatten()
    fill(model, "a", values)
    reference.assert_agrees(model)


def test_what_ia3_cannot_do_is_said() -> None:
    with pytest.raises(graft.GraftError, match="inputs: 'mlp.up' matches none of the adapter's sites"):
        graft.attach(base("llama"), {"a": graft.IA3(inputs=("mlp.up",))})
    with pytest.raises(graft.GraftError, match="a slice of the fused projection .* name attn.qkv"):
        graft.attach(base("gpt2"), {"a": graft.IA3(inputs=("attn.k",), sites="attn.k")})


@pytest.mark.parametrize(
    ("family", "sites"), [("bert", "bias"), ("gpt2", "bias"), ("gptj", "mlp.up norm.attn"), ("gpt2", "attn.q mlp.up")]
)
def test_bitfit_equals_ordinary_training_of_the_biases(family: str, sites: str) -> None:
    plain, model = base(family), base(family)
    graft.attach(model, {"a": graft.BitFit(sites=sites)})
    hosts = {name.rsplit(".", 2)[0] for name, _ in graft.parameters(model, "a")}
    plain.requires_grad_(False)
    chosen = [plain.get_submodule(host).bias for host in sorted(hosts)]
    for bias in chosen:
        bias.requires_grad_(True)
        if sites == "attn.q mlp.up" and bias.numel() == 96:  # queries are the first third of the fused projection
            bias.register_hook(lambda grad: grad * (torch.arange(96) < 32))
    if sites == "bias":  # BERT's head lists its bias twice
        listed = plain.named_parameters(remove_duplicate=False)
        every = {id(p) for name, p in listed if name.endswith("bias") and name != "cls.predictions.bias"}
        assert every == {id(p) for p in chosen}
    ours = [p for _, p in graft.parameters(model, "a")]
    assert steps(model, ours) == pytest.approx(steps(plain, chosen), abs=3e-5)
    expected = logits(plain, ids())
    torch.testing.assert_close(logits(model, ids()), expected, atol=2e-4, rtol=0)
    graft.merge(model, "a")
    torch.testing.assert_close(logits(model, ids()), expected, atol=2e-4, rtol=0)
    graft.unmerge(model, "a")
    assert same_base(model, family)


@pytest.mark.parametrize("name", ["bert-lora-biasall", "gpt2-lora-biasall"])
def test_bitfit_beside_lora_is_the_bias_all_of_peft(shared: Path, name: str) -> None:
    reference = case(shared, f"peft/{name}")
    model, stored, config = reference.base(), reference.tensors(), reference.config
    head = [graft.Full(sites="re:classifier")] if name.startswith("bert") else []
    lora = graft.LoRA(
        rank=config["r"], alpha=config["lora_alpha"], sites=tuple(f"re:.*{each}" for each in config["target_modules"])
    )
    graft.attach(model, {"a": [lora, graft.BitFit(), *head]})
    frozen, values = dict(model.named_parameters()), {}
    for name, _ in graft.parameters(model, "a"):
        module, _, own = name.rsplit(".", 2)
        if own in "AB":
            values[name] = stored.pop(f"{module}.lora_{own}.weight")
        else:
            theirs = f"{module}.base_layer.{own}" if f"{module}.base_layer.{own}" in stored else f"{module}.{own}"
            values[name] = stored.pop(theirs) - frozen[f"{module}.{own}"]
    assert set(stored) <= {"classifier.modules_to_save.bias", "classifier.original_module.bias"}  # PEFT's copies of one
    fill(model, "a", values)
    reference.assert_agrees(model)


@pytest.mark.parametrize("family", ["llama", "t5"])
def test_bitfit_on_a_base_without_biases_says_so(family: str) -> None:
    with pytest.raises(
        graft.GraftError, match="kind 'bitfit' at 'bias': no linear layer and no norm of this model has a bias"
    ):
        graft.attach(base(family), {"a": graft.BitFit()})
    with pytest.raises(graft.GraftError, match=r"'model.layers.0.self_attn.q_proj' has no bias to train"):
        graft.attach(base("llama"), {"a": graft.BitFit(sites="attn.q")})


def hooked(plain: nn.Module, module: str, act: Callable[[Tensor, Tensor], Tensor], before: bool = False) -> None:
    """Write an equation into the plain base: act(x or h, output of the bare layer)."""
    host = plain.get_submodule(module)
    if before:
        host.register_forward_pre_hook(lambda _, args: (act(args[0], args[0]),))
    else:
        host.register_forward_hook(lambda _, args, out: act(args[0], out))


def values_at(model: nn.Module) -> dict[str, dict[str, Tensor]]:
    """Module -> its adapter's parameters."""
    found: dict[str, dict[str, Tensor]] = {}
    for name, p in graft.parameters(model, "a"):
        module, _, own = name.rsplit(".", 2)
        found.setdefault(module, {})[own] = p.detach()
    return found


@pytest.mark.parametrize("position", ["after", "before"])
@pytest.mark.parametrize(("family", "norm"), [("bert", "attn"), ("bert", "mlp"), ("gpt2", "none")])
def test_hadamard_is_its_equation_with_the_norm_and_folds(family: str, norm: str, position: str) -> None:
    model, plain = base(family), base(family)
    graft.attach(model, {"a": {"kind": "hadamard", "position": position, "norm": norm, "sites": "attn.o@1"}})
    randomise(model, "a")
    for module, p in values_at(model).items():
        if "scale" not in p:
            with torch.no_grad():
                plain.get_submodule(module).weight.add_(p["weight"])
                plain.get_submodule(module).bias.add_(p["bias"])
            assert module == f"bert.encoder.layer.1.{'attention.' if norm == 'attn' else ''}output.LayerNorm"
        else:
            w, b = p["scale"], p["bias" if position == "after" else "shift"]
            hooked(plain, module, lambda x, h, w=w, b=b: w * h + b, before=position == "before")
    expected = logits(plain, ids())
    torch.testing.assert_close(logits(model, ids()), expected, atol=3e-5, rtol=0)
    graft.merge(model, "a")
    torch.testing.assert_close(logits(model, ids()), expected, atol=1e-4, rtol=0)


def test_the_norm_of_a_hadamard_adapter_follows_its_layers_and_unknown_ones_are_refused() -> None:
    parts = graft.Hadamard(sites="attn.o@last1 decoder.cross.o@0-3").parts()
    assert parts[1].sites == ("norm.attn@last1", "decoder.norm.cross@0-3")
    with pytest.raises(graft.GraftError, match="write norm: none"):
        graft.attach(base("bert"), {"a": graft.Hadamard(sites="re:.*attention.output.dense")})


@pytest.mark.parametrize("scale", ["output", "input", "none"])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_llama_adapter_v2_is_its_equation_in_the_papers_form_and_in_the_codes(family: str, scale: str) -> None:
    model, plain = base(family), base(family)
    graft.attach(model, {"a": {"kind": "llama-adapter-v2", "scale": scale}})
    randomise(model, "a")
    for module, p in values_at(model).items():
        host = plain.get_submodule(module)
        if "norm" in type(host).__name__.lower():
            with torch.no_grad():
                for name, difference in p.items():
                    getattr(host, name).add_(difference)
        elif scale == "input":
            hooked(plain, module, lambda x, h, p=p: x * p["scale"], before=True)
            hooked(plain, module, lambda x, h, p=p: h + p["bias"])
        else:
            hooked(plain, module, lambda x, h, p=p: (h + p["bias"]) * p.get("scale", 1.0))
    expected = logits(plain, ids())
    torch.testing.assert_close(logits(model, ids()), expected, atol=1e-4, rtol=0)
    if family == "llama":  # its layers have no bias, so there is nowhere to fold one
        with pytest.raises(CannotFold, match="learned a bias at .* where the base has none"):
            graft.merge(model, "a")
    else:
        graft.merge(model, "a")
        torch.testing.assert_close(logits(model, ids()), expected, atol=3e-4, rtol=0)


def test_the_site_language_leaves_out_what_a_question_mark_follows() -> None:
    model: Any = base("llama")
    graft.attach(model, {"a": graft.LoRA(rank=1, sites="attn.q cross.q? decoder.attn.v?")})
    assert {name.split(".")[-3] for name, _ in graft.parameters(model, "a")} == {"q_proj"}
    with pytest.raises(graft.GraftError, match="this model has none of the sites 'cross.q[?]'"):
        graft.attach(base("llama"), {"a": graft.LoRA(rank=1, sites="cross.q?")})


def test_an_adapter_without_the_usual_input_site_loads_again(tmp_path: Path) -> None:
    model, other = base("llama"), base("llama")
    graft.attach(model, {"a": graft.IA3(sites="attn.k attn.v")})
    graft.load(other, graft.save(model, "a", tmp_path / "a"))
    assert graft.names(other) == ("a",)
    with pytest.raises(graft.GraftError, match="'mlp.up' matches none"):
        graft.attach(base("llama"), {"a": graft.IA3(sites="attn.k", inputs=("mlp.up",))})

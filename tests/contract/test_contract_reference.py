"""Point 11: the numbers equal independent references: the algebra written out with hooks on the plain base, PEFT, published counts."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import BertConfig, BertModel, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

import graft
from graft.injection.state import state_of
from tests.contract.table import Row, attached, base, ids, logits, pristine, row_of, rows

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"relu": F.relu, "tanh": torch.tanh, "gelu": F.gelu}
_GEMMA = (("input_layernorm", "post_attention_layernorm"), ("pre_feedforward_layernorm", "post_feedforward_layernorm"))
SUBLAYERS = {  # family -> blocks, then for attn and for mlp: whose output is x, whose output is h
    "llama": ("model.layers", ("input_layernorm", "self_attn"), ("post_attention_layernorm", "mlp")),
    "gemma2": ("model.layers", *_GEMMA),
    "bloom": (
        "transformer.h",
        ("input_layernorm", "self_attention.dense"),
        ("post_attention_layernorm", "mlp.dense_4h_to_h"),
    ),
    "gptj": ("transformer.h", ("ln_1", "attn"), ("ln_1", "mlp")),
    "gpt2": ("transformer.h", ("ln_1", "attn"), ("ln_2", "mlp")),
    "bert": ("bert.encoder.layer", ("", "attention.output.dense"), ("attention.output", "output.dense")),
}


def bottleneck(part: Any, p: dict[str, Tensor]) -> Callable[[Tensor], Tensor]:
    """f(u) = s * up(act(down(norm(u)))) from its tensors."""

    def f(u: Tensor) -> Tensor:
        if part.norm:
            spread = torch.sqrt(u.var(-1, unbiased=False, keepdim=True) + 1e-5)
            u = (u - u.mean(-1, keepdim=True)) / spread * p["norm.weight"] + p["norm.bias"]
        low = ACTIVATIONS[part.activation](u @ p["down.weight"].T + p.get("down.bias", 0.0))
        return (low @ p["up.weight"].T + p.get("up.bias", 0.0)) * (
            p["scale"] if part.scale == "learned" else part.scale
        )

    return f


def changed(output: Any, act: Callable[[Tensor], Tensor]) -> Any:
    return (act(output[0]), *output[1:]) if isinstance(output, tuple) else act(output)


def hook(plain: Any, family: str, module: str, part: str, config: Any, p: dict[str, Tensor]) -> None:
    """Write one bottleneck site into the plain base."""
    f, series = bottleneck(config, p), config.kind == "series"
    if part in ("linear", "layer"):
        host = plain.get_submodule(module)
        if series and config.position == "before":
            host.register_forward_pre_hook(lambda _, args: (args[0] + f(args[0]), *args[1:]))
        elif series:
            host.register_forward_hook(
                lambda _, args, out: changed(out, lambda h: (h + p.get("bias", 0)) + f(h + p.get("bias", 0)))
            )
        else:
            host.register_forward_hook(lambda _, args, out: out + f(args[0]))
        return
    blocks, attn, mlp = SUBLAYERS[family]
    block = plain.get_submodule(".".join(module.split(".")[: blocks.count(".") + 2]))
    source, out = (block.get_submodule(path) for path in (attn if part == "attn" else mlp))
    if series and config.position == "before":
        consumer = block.get_submodule(
            {"llama": "self_attn", "bloom": "self_attention"}[family] if part == "attn" else "mlp"
        )
        consumer.register_forward_pre_hook(
            lambda _, args, kwargs: ((), kwargs | {"hidden_states": kwargs["hidden_states"] + f(kwargs["hidden_states"])})
            if "hidden_states" in kwargs else ((args[0] + f(args[0]), *args[1:]), kwargs), with_kwargs=True,
        )  # fmt: skip
    elif series:
        out.register_forward_hook(lambda _, args, output: changed(output, lambda h: h + f(h)))
    else:
        seen: list[Tensor] = []
        source.register_forward_hook(lambda _, args, output: seen.__setitem__(slice(None), [output]))
        out.register_forward_hook(lambda _, args, output: changed(output, lambda h: h + f(seen[0])))


def written(row: Row) -> bool:
    """Whether `hook` says all of these equations on this family."""
    for part in row.config.parts():
        if part.kind not in ("series", "parallel") or part.reads != "site" or getattr(part, "skip", "site") != "site":
            return False
        names = set(str(part.sites).split())
        if getattr(part, "position", "after") == "before" and names & {"attn", "mlp"}:
            if row.family not in (("llama", "bloom") if "attn" in names else set(SUBLAYERS) - {"bert"}):
                return False
        elif part.kind == "parallel" and "attn" in names and row.family == "bert":
            return False
    return row.family in SUBLAYERS


@rows(where=written)
def test_bottlenecks_equal_the_algebra_written_into_the_plain_base(row: Row) -> None:
    model, reference = attached(row), base(row.family)
    for installed in state_of(model).adapter("a").installs:
        p = {name.removeprefix("f."): tensor.detach() for name, tensor in installed.module.named_parameters()}
        hook(reference, row.family, installed.site.module, installed.site.part, installed.config, p)
    torch.testing.assert_close(logits(model, ids()), logits(reference, ids()), atol=3e-5, rtol=0)


def peft_of(family: str, config: Any) -> Any:
    peft = pytest.importorskip("peft")
    return peft.get_peft_model(base(family), config).eval()


_PATTERNS = graft.LoRA(
    rank=4,
    alpha=3,
    rslora=True,
    sites="attn.q attn.v mlp.down@1",
    rank_pattern={"attn.q": 2},
    alpha_pattern={"mlp.down": 5},
)
_PEFTS = {
    "target_modules": r".*(q_proj|v_proj|layers\.1\.mlp\.down_proj)",
    "use_rslora": True,
    "rank_pattern": {"q_proj": 2},
    "alpha_pattern": {"down_proj": 5},
}


def lora(sites: str) -> graft.LoRA:
    return graft.LoRA(rank=4, alpha=3, sites=sites)


@pytest.mark.parametrize(
    ("family", "ours", "theirs"),
    [
        ("llama", lora("linear"), {"target_modules": "all-linear"}),
        ("llama", _PATTERNS, _PEFTS),
        ("gpt2", lora("attn.qkv mlp.down"), {"target_modules": ["c_attn", "mlp.c_proj"], "fan_in_fan_out": True}),
        ("bloom", lora("attn.qkv attn.o"), {"target_modules": ["query_key_value", "self_attention.dense"]}),
        ("bert", lora("attn.q attn.v"), {"target_modules": ["query", "value"]}),
    ],
)
def test_lora_equals_peft(family: str, ours: graft.LoRA, theirs: dict[str, Any]) -> None:
    peft = pytest.importorskip("peft")
    reference = peft_of(family, peft.LoraConfig(r=4, lora_alpha=3, **theirs))
    model = base(family)
    graft.attach(model, {"a": ours})
    generator, stored = torch.Generator().manual_seed(2), dict(reference.named_parameters())
    for name, p in graft.parameters(model, "a"):
        module, letter = name.removesuffix(".linear." + name[-1]), name[-1]
        with torch.no_grad():
            p.normal_(std=0.3, generator=generator)
            stored.pop(f"base_model.model.{module}.lora_{letter}.default.weight").copy_(p)
    assert not [name for name in stored if "lora_" in name]
    torch.testing.assert_close(logits(model, ids()), logits(reference, ids()), atol=3e-5, rtol=0)


@pytest.mark.parametrize("family", ["llama", "gpt2", "bloom", "gptj", "qwen3"])
def test_a_prefix_whose_positions_come_first_equals_peft(family: str) -> None:
    peft = pytest.importorskip("peft")
    reference = peft_of(family, peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3))
    model = base(family)
    graft.attach(model, {"a": graft.Prefix(tokens=3, positions="after_prefix", init_std=1.0)})
    # keys, values of layer 0, then of layer 1: the order of PEFT's slots
    sites = [p.detach() for _, p in graft.parameters(model, "a")]
    embedding = reference.prompt_encoder["default"].embedding.weight
    with torch.no_grad():
        embedding.copy_(torch.stack(sites, 1).flatten(1))
    outputs = [logits(each, ids(), attention_mask=torch.ones_like(ids())) for each in (model, reference)]
    torch.testing.assert_close(*outputs, atol=3e-5, rtol=0)


def test_a_prefix_at_positions_zero_equals_attention_written_out() -> None:
    """LLaMA's block by hand: rotated queries and keys of the sequence, unrotated keys of the prefix before them, no mask on those."""
    model, inputs = attached(row_of("llama-prefix")), ids(2, 6)
    plain, prefix = pristine("llama").model, dict(graft.parameters(model, "a"))
    length, head = 6, 8
    angle = torch.arange(length)[:, None] / 10000 ** (torch.arange(0, head, 2) / head)
    cos, sin = (fn(torch.cat([angle, angle], -1)) for fn in (torch.cos, torch.sin))

    def rotated(x: Tensor) -> Tensor:
        return x * cos + torch.cat([-x[..., head // 2 :], x[..., : head // 2]], -1) * sin

    with torch.no_grad():
        x = plain.embed_tokens(inputs)
        for number, layer in enumerate(plain.layers):
            u, attention = layer.input_layernorm(x), layer.self_attn
            q, k, v = (
                project(u).view(2, length, -1, head).transpose(1, 2)
                for project in (attention.q_proj, attention.k_proj, attention.v_proj)
            )
            own = (prefix[f"model.layers.{number}.self_attn.prefix.{name}"] for name in ("keys", "values"))
            own_k, own_v = (x_PKD.transpose(0, 1).expand(2, -1, -1, -1) for x_PKD in own)
            k, v = (
                torch.cat([own_k, rotated(k)], 2).repeat_interleave(2, 1),
                torch.cat([own_v, v], 2).repeat_interleave(2, 1),
            )
            scores = rotated(q) @ k.transpose(-1, -2) / math.sqrt(head)
            hidden = torch.ones(length, length, dtype=torch.bool).triu(1)
            scores[..., 3:] = scores[..., 3:].masked_fill(hidden, -math.inf)
            x = x + attention.o_proj((scores.softmax(-1) @ v).transpose(1, 2).flatten(2))
            x = x + layer.mlp(layer.post_attention_layernorm(x))
        expected = pristine("llama").lm_head(plain.norm(x))
    torch.testing.assert_close(logits(model, inputs), expected, atol=3e-5, rtol=0)


def count(model: nn.Module, spec: Any) -> int:
    graft.attach(model, {"a": spec})
    found = sum(p.numel() for _, p in graft.parameters(model, "a"))
    graft.detach(model)
    return found


def test_counts_equal_the_published_ones() -> None:
    with torch.device("meta"):
        llama = LlamaForCausalLM(
            LlamaConfig(hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32)
        )
        gpt2 = GPT2LMHeadModel(GPT2Config(n_embd=1024, n_layer=24, n_head=16))
        bert = BertModel(BertConfig())
    presets = {
        "lora": 56_098_816,
        "series": 67_108_864,
        "adapterh": 201_326_592,
        "adapterp": 67_108_864,
        "parallel": 247_463_936,
    }
    for name, published in (presets | {"prefix": 2_621_440}).items():
        assert count(llama, f"llm-adapters/{name}") == published, name
    assert count(llama, graft.LoRA(rank=8, sites="attn.q attn.v")) == 4_194_304
    assert count(gpt2, graft.LoRA(rank=4, sites="attn.qkv")) == 393_216
    assert count(gpt2, graft.Prefix(tokens=5)) == 245_760
    assert count(gpt2, graft.Prefix(tokens=5, projection=1024)) == 51_435_520
    assert count(bert, graft.LoRA(rank=8, sites="attn.q attn.v")) == 294_912

"""The table of families, written out by hand: which module every name of the site language means."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

import graft
from graft.adapters.kinds.prefix import Prefix
from graft.adapters.kinds.series import Series
from graft.architectures.site import Site
from graft.architectures.sites import SiteTable
from graft.injection.state import sites_of
from tests.families.test_sublayers import NORMS
from tests.families.zoo import TABLE, tiny

GATED = {
    "attn.q": "self_attn.q_proj", "attn.k": "self_attn.k_proj", "attn.v": "self_attn.v_proj", "attn.o": "self_attn.o_proj",
    "mlp.gate": "mlp.gate_proj", "mlp.up": "mlp.up_proj", "mlp.down": "mlp.down_proj",
    "attn": "self_attn -> self_attn.o_proj", "mlp": "mlp -> mlp.down_proj",
}  # fmt: skip
POST_NORMS = {
    **GATED,
    "attn": "self_attn -> post_attention_layernorm",
    "mlp": "mlp -> post_feedforward_layernorm",
}
BLOOM = {
    "attn.qkv": "self_attention.query_key_value", "attn.o": "self_attention.dense",
    "mlp.up": "mlp.dense_h_to_4h", "mlp.down": "mlp.dense_4h_to_h",
    "attn": "self_attention -> self_attention.dense", "mlp": "mlp -> mlp.dense_4h_to_h",
}  # fmt: skip
LLAMA_HOME = ("model.layers", "model.embed_tokens", "lm_head")
GPT_HOME = ("transformer.h", "transformer.wte", "lm_head")
BLOOM_HOME = ("transformer.h", "transformer.word_embeddings", "lm_head")

EXPECTED: dict[str, tuple[tuple[str, str, str], dict[str, str]]] = {
    "llama": (LLAMA_HOME, GATED),
    "mistral": (LLAMA_HOME, GATED),
    "qwen2": (LLAMA_HOME, GATED),
    "qwen3": (LLAMA_HOME, GATED),
    "gemma": (LLAMA_HOME, GATED),
    "gemma2": (LLAMA_HOME, POST_NORMS),
    "gemma3_text": (LLAMA_HOME, POST_NORMS),
    "phi": (LLAMA_HOME, {
        "attn.q": "self_attn.q_proj", "attn.k": "self_attn.k_proj", "attn.v": "self_attn.v_proj", "attn.o": "self_attn.dense",
        "mlp.up": "mlp.fc1", "mlp.down": "mlp.fc2", "attn": "self_attn -> self_attn.dense", "mlp": "mlp -> mlp.fc2",
    }),
    "phi3": (LLAMA_HOME, {
        "attn.qkv": "self_attn.qkv_proj", "attn.o": "self_attn.o_proj", "mlp.gate_up": "mlp.gate_up_proj", "mlp.down": "mlp.down_proj",
        "attn": "self_attn -> self_attn.o_proj", "mlp": "mlp -> mlp.down_proj",
    }),
    "opt": (("model.decoder.layers", "model.decoder.embed_tokens", "lm_head"), {
        "attn.q": "self_attn.q_proj", "attn.k": "self_attn.k_proj", "attn.v": "self_attn.v_proj", "attn.o": "self_attn.out_proj",
        "mlp.up": "fc1", "mlp.down": "fc2", "attn": "self_attn -> self_attn.out_proj", "mlp": "fc1 -> fc2",
    }),
    "gpt2": (GPT_HOME, {
        "attn.qkv": "attn.c_attn", "attn.o": "attn.c_proj", "mlp.up": "mlp.c_fc", "mlp.down": "mlp.c_proj",
        "attn": "attn -> attn.c_proj", "mlp": "mlp -> mlp.c_proj",
    }),
    "gpt_neox": (("gpt_neox.layers", "gpt_neox.embed_in", "lm_head"), {
        "attn.qkv": "attention.query_key_value", "attn.o": "attention.dense",
        "mlp.up": "mlp.dense_h_to_4h", "mlp.down": "mlp.dense_4h_to_h",
        "attn": "attention -> attention.dense", "mlp": "mlp -> mlp.dense_4h_to_h",
    }),
    "gptj": (GPT_HOME, {
        "attn.q": "attn.q_proj", "attn.k": "attn.k_proj", "attn.v": "attn.v_proj", "attn.o": "attn.out_proj",
        "mlp.up": "mlp.fc_in", "mlp.down": "mlp.fc_out", "attn": "attn -> attn.out_proj", "mlp": "mlp -> mlp.fc_out",
    }),
    "bloom": (BLOOM_HOME, BLOOM),
    "falcon": (BLOOM_HOME, BLOOM),
    "falcon-mq": (BLOOM_HOME, BLOOM),
    "falcon-mha": (BLOOM_HOME, BLOOM),
}  # fmt: skip
BIASED = {"qwen2", "phi", "opt", "gpt2", "gpt_neox", "gptj", "bloom", "falcon", "falcon-mq", "falcon-mha"}


class Anything(Series):
    """A kind that takes every type of site."""

    takes = frozenset({"linear", "sublayer", "embedding", "other"})


def _sites(model: nn.Module, names: str) -> list[Site]:
    return sites_of(model, Anything(sites=names))


@pytest.mark.parametrize("family", TABLE)
def test_every_name_means_the_module_written_here(family: str) -> None:
    model = tiny(family)
    (blocks, embed, head), table = EXPECTED[family]
    for name, module in table.items():
        source, _, out = module.rpartition(" -> ")
        found = _sites(model, name)
        assert [site.module for site in found] == [f"{blocks}.0.{out}", f"{blocks}.1.{out}"]
        assert [site.source for site in found] == (
            [f"{blocks}.{i}.{source}" for i in (0, 1)] if source else [None, None]
        )
        assert [site.layer for site in found] == [0, 1]
    assert [site.module for site in _sites(model, "embed head")] == [embed, head]
    assert [site.module for site in _sites(model, "layer")] == [f"{blocks}.0", f"{blocks}.1"]
    linears = {f"{blocks}.{layer}.{path}" for layer in (0, 1) for name, path in table.items() if "." in name}
    assert {site.module for site in _sites(model, "linear")} == linears
    for name, norm in zip(("norm.attn", "norm.mlp"), NORMS[family], strict=True):
        assert [site.module for site in _sites(model, name)] == [f"{blocks}.{layer}.{norm}" for layer in (0, 1)]
    parts = {"attn.q", "attn.k", "attn.v"} if "attn.qkv" in table else set()
    more = {"norm", "norm.attn", "norm.mlp", "layer", "linear", "embed", "head"} | (
        {"bias"} if family in BIASED else set()
    )
    assert SiteTable(model).names() == {*table, *parts, *more}


@pytest.mark.parametrize("family", TABLE)
def test_widths_and_heads_are_those_of_the_config(family: str) -> None:
    model = tiny(family)
    for site in _sites(model, "attn mlp layer"):
        assert (site.in_features, site.out_features) == (32, 32)
    kv_heads = {
        "falcon-mq": 1,
        **dict.fromkeys(("phi", "opt", "gpt2", "gpt_neox", "gptj", "bloom", "falcon-mha"), 4),
    }.get(family, 2)
    for site in sites_of(model, Prefix()):
        assert (site.num_heads, site.num_kv_heads, site.head_dim) == (4, kv_heads, 8)
    sizes = {name: site.out_features for name in ("attn.q", "attn.k", "attn.v") for site in _sites(model, name)}
    assert sizes == {"attn.q": 32, "attn.k": 8 * kv_heads, "attn.v": 8 * kv_heads}


@pytest.mark.parametrize(
    ("name", "layers"),
    [
        ("mlp@1", [1]),
        ("mlp@1-2", [1, 2]),
        ("mlp@0,2-3", [0, 2, 3]),
        ("mlp@first2", [0, 1]),
        ("mlp@last1", [3]),
        ("mlp@last9", [0, 1, 2, 3]),
    ],
)
def test_a_range_of_layers(name: str, layers: list[int]) -> None:
    assert [site.layer for site in _sites(tiny("llama", num_hidden_layers=4), name)] == layers


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("mlp@2", "layers 0 to 1"),
        ("mlp@1-0", "do not exist"),
        ("mlp@x", "not a layer range"),
        ("attn.qq", r"Did you mean 'attn\.q'"),
        ("mlp.gate_up", "layers 0 to 1"),
        ("re:nothing", "matches nothing"),
        ("attn.q@", "'attn.q@': '' is not a layer range; write 3, 0-15"),
        ("attn.q@last0", "'last0' is not a layer range"),
        ("re:(", "not a regular expression"),
    ],
)
def test_a_name_that_matches_nothing_says_what_exists(name: str, said: str) -> None:
    with pytest.raises(graft.GraftError, match=said):
        _sites(tiny("llama"), name)


def test_a_kind_says_which_sites_it_takes() -> None:
    with pytest.raises(graft.GraftError, match="takes .*linear sites; 'mlp' is a sublayer site"):
        sites_of(tiny("llama"), graft.LoRA(sites="mlp"))


@pytest.mark.parametrize("family", TABLE)
def test_norm_and_bias_are_every_norm_and_every_bias_of_the_model(family: str) -> None:
    model = tiny(family)
    weights = {
        name.rpartition(".")[0]
        for name, weight in model.named_parameters()
        if weight.dim() == 1 and name.endswith("weight")
    }
    assert {site.module for site in _sites(model, "norm")} == weights
    assert all((site.in_features, site.out_features) == (site.in_features,) * 2 for site in _sites(model, "norm"))
    biases = {name.rpartition(".")[0] for name, _ in model.named_parameters() if name.endswith(".bias")}
    if family in BIASED:
        assert {site.module for site in _sites(model, "bias")} == biases
    else:
        assert not biases


def test_a_regular_expression_matches_whole_module_names_and_keeps_the_layer() -> None:
    sites = _sites(tiny("llama"), r"re:model\.layers\.\d+\.input_layernorm")
    assert [(site.module, site.layer) for site in sites] == [(f"model.layers.{i}.input_layernorm", i) for i in (0, 1)]


def test_a_site_named_twice_is_one_site() -> None:
    assert len(_sites(tiny("llama"), "mlp.up linear mlp.up@0")) == 14


def test_a_chain_of_linear_layers_is_adapted_by_name() -> None:
    model = nn.Sequential(nn.Linear(3, 5), nn.Linear(5, 2))
    with pytest.raises(graft.GraftError, match="No transformer blocks were recognised"):
        graft.attach(model, {"a": graft.LoRA(rank=1)})
    graft.attach(model, {"a": graft.LoRA(rank=2, alpha=6, sites="re:[01]")})
    found = dict(graft.parameters(model, "a"))
    assert list(found) == ["0.linear.A", "0.linear.B", "1.linear.A", "1.linear.B"]
    for parameter in found.values():
        parameter.data.normal_()
    x = torch.randn(4, 3)
    expected = x
    for layer in (0, 1):
        weight = model[layer].weight + 3.0 * found[f"{layer}.linear.B"] @ found[f"{layer}.linear.A"]
        expected = expected @ weight.T + model[layer].bias
    torch.testing.assert_close(model(x), expected)


def test_a_tower_for_images_is_meant_only_where_it_is_named() -> None:
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2}
    vision = CLIPVisionConfig(**sizes, num_hidden_layers=2, image_size=8, patch_size=4).to_dict()
    text = LlamaConfig(**sizes, num_hidden_layers=3, vocab_size=50).to_dict()
    model = LlavaForConditionalGeneration(LlavaConfig(vision_config=vision, text_config=text, image_token_index=49))
    queries = [f"model.vision_tower.encoder.layers.{layer}.self_attn.q_proj" for layer in (0, 1)]
    assert [site.module for site in _sites(model, "vision.attn.q")] == queries
    assert [site.module for site in _sites(model, "vision.attn.q@last1")] == queries[1:]
    assert graft.sites(model)["vision.attn.q"] == tuple(queries)
    assert len(_sites(model, "vision.linear")) == 2 * 6
    for name, count in {"linear": 3 * 7, "attn.q": 3, "norm": 3 * 2 + 1, "layer": 3}.items():
        modules = [site.module for site in _sites(model, name)]
        assert len(modules) == count and not any("vision" in module for module in modules), name

"""Families that are not in the table are read off the structure of their blocks, or say what they lack."""

from __future__ import annotations

import pytest

import graft
from graft.architectures.sites import SiteTable
from graft.injection.state import sites_of
from tests.families.zoo import OTHERS, batch, tiny

GATED = {"attn.q", "attn.k", "attn.v", "attn.o", "mlp.gate", "mlp.up", "mlp.down", "attn", "mlp"}
PLAIN = GATED - {"mlp.gate"}
FUSED = {"attn.qkv", "attn.o", "mlp.up", "mlp.down", "attn", "mlp"}
RESOLVES = {
    **dict.fromkeys(("stablelm", "cohere", "olmo2", "exaone4", "granite"), GATED),
    **dict.fromkeys(("starcoder2", "xglm", "gpt_neo"), PLAIN),
    **dict.fromkeys(("glm", "glm4"), GATED - {"mlp.gate", "mlp.up"} | {"mlp.gate_up"}),
    **dict.fromkeys(("mpt", "codegen", "gpt_bigcode"), FUSED),
    "mixtral": {"attn.q", "attn.k", "attn.v", "attn.o", "attn", "mlp", "experts.gate_up", "experts.down"},
}


def test_every_other_family_is_listed_here() -> None:
    assert set(RESOLVES) == set(OTHERS)


@pytest.mark.parametrize("family", RESOLVES)
def test_the_names_that_a_family_answers_to(family: str) -> None:
    model = tiny(family)
    more = {"norm", "norm.attn", "layer", "linear", "embed", "head"}
    more |= {"bias"} if any(name.endswith(".bias") for name, _ in model.named_parameters()) else set()
    more |= {"norm.mlp"} if "mlp" in RESOLVES[family] else set()
    assert SiteTable(model).names() == RESOLVES[family] | more


@pytest.mark.parametrize("family", RESOLVES)
def test_every_linear_layer_that_is_called_can_be_adapted_and_takes_part(family: str) -> None:
    model = tiny(family)
    names = " ".join(sorted(RESOLVES[family] - {"attn", "mlp"}))
    before = model(**batch(padded=False)).logits
    graft.attach(model, {"a": graft.LoRA(rank=1, sites=names)})  # proves that every site is reached
    for name, parameter in graft.parameters(model, "a"):
        parameter.data.fill_(0.1)
        assert name.rsplit(".", 2)[0] in {site.module for site in sites_of(model, graft.LoRA(sites=names))}
    assert (model(**batch(padded=False)).logits - before).abs().max() > 1e-3


@pytest.mark.parametrize("family", ["mpt", "codegen"])
def test_a_fused_projection_of_unknown_layout_is_whole_or_nothing(family: str) -> None:
    with pytest.raises(graft.GraftError, match=r"attn\.q' matches nothing.*attn\.qkv"):
        sites_of(tiny(family), graft.LoRA(sites="attn.q"))


@pytest.mark.parametrize("family", ["mpt", "gpt_neo", "xglm"])
def test_attention_that_cannot_take_virtual_tokens_says_so_and_leaves_the_model_alone(family: str) -> None:
    model = tiny(family)
    with pytest.raises(graft.GraftError, match="does not use transformers' attention interface"):
        graft.attach(model, {"a": graft.Prefix(tokens=2)})
    assert graft.names(model) == ()
    assert all(parameter.requires_grad for parameter in model.parameters())

"""q, k and v of a fused projection: rows that change one head of one of them, as the attention module itself splits them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AttentionInterface

import graft
from graft.architectures.site import Site
from graft.injection.state import sites_of
from tests.families.zoo import tiny

SEEN: dict[str, Tensor] = {}
FUSED = ("phi3", "gpt2", "gpt_neox", "bloom", "falcon", "falcon-mq", "falcon-mha")


def _watch(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, **kwargs: Any) -> tuple[Tensor, None]:
    """An attention function that only notes what it is given: [B, heads, L, head size] each."""
    SEEN.update(q=query, k=key, v=value)
    return torch.zeros_like(query).transpose(1, 2), None


AttentionInterface.register("watching", _watch)


def _heads_of(model: Any, attention: Any) -> dict[str, Tensor]:
    """q, k, v [B, heads, L, head size] of one attention module, by its own way of splitting."""
    ids = torch.arange(5)[None]
    names = {"_reshape": False, "_split_heads": True}
    method = next((name for name in names if hasattr(type(attention), name)), None)
    with torch.no_grad():
        if method is None:
            model.config._attn_implementation = "watching"
            model(input_ids=ids, use_cache=False)
            return dict(SEEN)
        seen: dict[str, Tensor] = {}
        handle = attention.query_key_value.register_forward_hook(lambda module, args, h: seen.update(h=h))
        model(input_ids=ids, use_cache=False)
        handle.remove()
        parts = getattr(attention, method)(seen["h"])
    return {name: part.transpose(1, 2) if names[method] else part for name, part in zip("qkv", parts, strict=True)}


def _rows(site: Site) -> Tensor:
    assert site.features is not None
    return torch.arange(site.features.start, site.features.stop) if isinstance(site.features, slice) else site.features


@pytest.mark.parametrize("part", ["q", "k", "v"])
@pytest.mark.parametrize("family", FUSED)
def test_eight_rows_in_turn_change_one_head_of_one_part_and_nothing_else(family: str, part: str) -> None:
    model = tiny(family)
    site = sites_of(model, graft.LoRA(sites=f"attn.{part}"))[-1]  # the last layer: what changes there feeds nothing
    host, attention = model.get_submodule(site.module), model.get_submodule(site.module.rsplit(".", 1)[0])
    weight = host.weight.data.T if family == "gpt2" else host.weight.data
    before = _heads_of(model, attention)
    copies = before["k"].shape[1] // site.num_kv_heads if part != "q" and site.num_kv_heads else 1
    if family == "falcon" and part != "q":
        copies = 2  # the new decoder hands each key-value head to two query heads already
    for head, rows in enumerate(_rows(site).split(8)):
        old = weight[rows].clone()
        weight[rows] += 1.0
        after = _heads_of(model, attention)
        weight[rows] = old
        for name in "qkv":
            changed = (before[name] != after[name]).any(-1).any(-1)[0].nonzero().flatten().tolist()
            assert changed == (list(range(head * copies, (head + 1) * copies)) if name == part else [])


@pytest.mark.parametrize("family", FUSED)
def test_the_three_parts_cover_every_row_once(family: str) -> None:
    model = tiny(family)
    sites = [site for site in sites_of(model, graft.LoRA(sites="attn.q attn.k attn.v")) if site.layer == 0]
    (whole,) = (site for site in sites_of(model, graft.LoRA(sites="attn.qkv@0")))
    rows = torch.cat([_rows(site) for site in sites])
    assert rows.sort().values.tolist() == list(range(whole.out_features))


@pytest.mark.parametrize("family", FUSED)
def test_lora_on_a_part_is_lora_on_the_whole_with_the_other_rows_zero(family: str) -> None:
    part, whole = tiny(family), tiny(family)
    graft.attach(part, {"a": graft.LoRA(rank=2, sites="attn.q attn.v")})
    graft.attach(whole, {"a": graft.LoRA(rank=4, sites="attn.qkv", alpha=32)})
    torch.manual_seed(0)
    given = {name: parameter.data.normal_() for name, parameter in graft.parameters(part, "a")}
    for name, parameter in graft.parameters(whole, "a"):
        host, _, side = name.rpartition(".linear.")
        q, v = (given[f"{host}.{which}.{side}"] for which in "qv")
        if side == "A":
            parameter.data.copy_(torch.cat([q, v]))
        else:
            rows = {
                site.part: _rows(site)
                for site in sites_of(part, graft.LoRA(sites="attn.q attn.v"))
                if site.module == host
            }
            parameter.data.zero_()
            parameter.data[rows["q"], :2], parameter.data[rows["v"], 2:] = q, v
    ids = torch.arange(7)[None] + 3
    with torch.no_grad():
        assert (part(input_ids=ids).logits - whole(input_ids=ids).logits).abs().max() < 1e-5


def test_a_part_of_a_fused_projection_has_no_input_of_its_own() -> None:
    with pytest.raises(graft.GraftError, match=r"slice of a fused projection.*attn\.qkv"):
        graft.attach(tiny("bloom"), {"a": graft.Series(position="before", sites="attn.q")})

"""Encoders and encoder-decoders: what the names mean, where the residual stream is, and prefixes as tokens that stand in front.

r is the residual stream, h what a sublayer adds to it. A virtual token whose key and value are those of a real token does what that token
does; where positions count, the sequence has to start behind it.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import graft
from graft.architectures.blocks import stack_of
from graft.architectures.sites import SiteTable
from graft.injection.state import sites_of
from tests.families.zoo import ENCODERS, inputs_of, tiny

SELF = "attention.self"
QKV = {"bert": "query key value", "deberta-v2": "query_proj key_proj value_proj"}
TWO_STACKS = ("t5", "mt5", "bart", "mbart")


def _parts(site: str, module: str, names: str, out: str) -> dict[str, str]:
    q, k, v = names.split()
    return {f"{site}.q": f"{module}.{q}", f"{site}.k": f"{module}.{k}", f"{site}.v": f"{module}.{v}", f"{site}.o": out}


def _bert(names: str = "query key value") -> dict[str, str]:
    return {
        **_parts("attn", SELF, names, "attention.output.dense"), "mlp.up": "intermediate.dense", "mlp.down": "output.dense",
        "attn": f"{SELF} -> attention.output.dense", "mlp": "intermediate -> output.dense",
        "norm.attn": "attention.output.LayerNorm", "norm.mlp": "output.LayerNorm",
    }  # fmt: skip


def _t5(stack: str, gated: bool) -> dict[str, str]:
    last = "layer.1" if stack == "encoder" else "layer.2"
    attn, cross, mlp = "layer.0.SelfAttention", "layer.1.EncDecAttention", f"{last}.DenseReluDense"
    table = _parts("attn", attn, "q k v", f"{attn}.o") | {
        "attn": f"{attn} -> {attn}.o",
        "norm.attn": "layer.0.layer_norm",
    }
    if stack == "decoder":
        table |= _parts("cross", cross, "q k v", f"{cross}.o") | {
            "cross": f"{cross} -> {cross}.o",
            "norm.cross": "layer.1.layer_norm",
        }
    table |= {"mlp.gate": f"{mlp}.wi_0", "mlp.up": f"{mlp}.wi_1"} if gated else {"mlp.up": f"{mlp}.wi"}
    return {**table, "mlp.down": f"{mlp}.wo", "mlp": f"{mlp} -> {mlp}.wo", "norm.mlp": f"{last}.layer_norm"}


def _bart(stack: str) -> dict[str, str]:
    table = {"attn": "self_attn", "cross": "encoder_attn"} if stack == "decoder" else {"attn": "self_attn"}
    found = {"mlp.up": "fc1", "mlp.down": "fc2", "mlp": "fc1 -> fc2", "norm.mlp": "final_layer_norm"}
    for site, module in table.items():
        out = f"{module}.out_proj"
        found |= _parts(site, module, "q_proj k_proj v_proj", out)
        found |= {site: f"{module} -> {out}", f"norm.{site}": f"{module}_layer_norm"}
    return found


EXPECTED: dict[str, dict[str, dict[str, str]]] = {
    **{name: {f"{home}.encoder.layer": _bert()} for name, home in (("bert", "bert"), ("roberta", "roberta"), ("electra", "electra"))},
    "distilbert": {"distilbert.transformer.layer": {
        **_parts("attn", "attention", "q_lin k_lin v_lin", "attention.out_lin"), "mlp.up": "ffn.lin1", "mlp.down": "ffn.lin2",
        "attn": "attention -> attention.out_lin", "mlp": "ffn -> ffn.lin2", "norm.attn": "sa_layer_norm", "norm.mlp": "output_layer_norm",
    }},
    "deberta": {"deberta.encoder.layer": {
        **{name: path for name, path in _bert().items() if name not in ("attn.q", "attn.k", "attn.v")}, "attn.qkv": f"{SELF}.in_proj",
    }},
    "deberta-v2": {"deberta.encoder.layer": _bert("query_proj key_proj value_proj")},
    "modernbert": {"model.layers": {
        "attn.qkv": "attn.Wqkv", "attn.o": "attn.Wo", "mlp.gate_up": "mlp.Wi", "mlp.down": "mlp.Wo",
        "attn": "attn -> attn.Wo", "mlp": "mlp -> mlp.Wo", "norm.mlp": "mlp_norm",
    }},
    "vit": {"vit.layers": {
        **_parts("attn", "attention", "q_proj k_proj v_proj", "attention.o_proj"), "mlp.up": "mlp.fc1", "mlp.down": "mlp.fc2",
        "attn": "attention -> attention.o_proj", "mlp": "mlp -> mlp.fc2", "norm.attn": "layernorm_before", "norm.mlp": "layernorm_after",
    }},
    "t5": {f"{stack}.block": _t5(stack, gated=False) for stack in ("encoder", "decoder")},
    "mt5": {f"{stack}.block": _t5(stack, gated=True) for stack in ("encoder", "decoder")},
    **{name: {f"model.{stack}.layers": _bart(stack) for stack in ("encoder", "decoder")} for name in ("bart", "mbart")},
}  # fmt: skip


class Anything(graft.Series):
    """A kind that takes every type of site."""

    takes = frozenset({"linear", "sublayer", "embedding", "norm", "other"})


def _by_stack(model: Any, name: str) -> dict[str, list[Any]]:
    found: dict[str, list[Any]] = {}
    for site in sites_of(model, Anything(sites=name)):
        found.setdefault(site.module.rpartition(f".{site.layer}.")[0] or site.module.rpartition(".")[0], []).append(
            site
        )
    return found


@pytest.mark.parametrize("family", ENCODERS)
def test_every_name_means_the_module_written_here(family: str) -> None:
    model = tiny(family)
    tables = EXPECTED[family]
    for name in {name for table in tables.values() for name in table}:
        found = sites_of(model, Anything(sites=name))
        wanted = [
            (home, i, table[name].rpartition(" -> ")) for home, table in tables.items() if name in table for i in (0, 1)
        ]
        assert [site.module for site in found] == [f"{home}.{i}.{out}" for home, i, (_, _, out) in wanted], name
        assert [site.source for site in found] == [
            f"{home}.{i}.{source}" if source else None for home, i, (source, _, _) in wanted
        ]
        assert [site.layer for site in found] == [i for _, i, _ in wanted]
    unnamed = {"norm.attn"} if family == "modernbert" else set()  # its first layer has none
    named = {name for table in tables.values() for name in table}
    parts = {"attn.q", "attn.k", "attn.v"} if "attn.qkv" in named else set()
    more = SiteTable(model).names() - named - parts - unnamed - {"bias", "embed", "head"}
    assert more == {"layer", "linear", "norm"}


@pytest.mark.parametrize("family", ENCODERS)
def test_the_stream_and_what_the_sublayers_add_make_the_block(family: str) -> None:
    model = tiny(family)
    layers, sublayers = (
        _by_stack(model, "layer"),
        sites_of(model, Anything(sites="attn mlp" + " cross" * (family in TWO_STACKS))),
    )
    seen: dict[str, Tensor] = {}

    def note(path: str) -> Any:
        def hook(module: Any, args: Any, kwargs: Any, out: Any) -> None:
            seen[f"{path}<"], seen[f"{path}>"] = (
                args[0] if args else kwargs["hidden_states"],
                out[0] if isinstance(out, tuple) else out,
            )

        return hook

    everything = [*sublayers, *(site for sites in layers.values() for site in sites)]
    for path in {path for site in everything for path in (site.module, site.source, site.residual, site.norm) if path}:
        model.get_submodule(path).register_forward_hook(note(path), with_kwargs=True)
    with torch.no_grad():
        model(**inputs_of(family, padded=False))
    for block in (site for sites in layers.values() for site in sites):
        stream = seen[f"{block.module}<"]
        inside = [site for site in sublayers if site.module.startswith(f"{block.module}.")]
        for site in sorted(inside, key=lambda site: ("attn", "cross", "mlp").index(site.name)):
            assert torch.equal(seen[f"{site.residual}<"], stream)
            total = stream + seen[f"{site.module}>"]
            if site.norm is None:
                assert torch.equal(seen[f"{site.residual}>"], seen[f"{site.source}<"])
                stream = total
            else:
                assert site.residual == site.source
                assert (seen[f"{site.norm}<"] - total).abs().max() < 1e-5
                stream = seen[f"{site.norm}>"]
        assert (seen[f"{block.module}>"] - stream).abs().max() < 1e-5


@pytest.mark.parametrize("family", TWO_STACKS)
def test_stacks_are_told_apart_and_count_their_own_layers(family: str) -> None:
    model = tiny(family)

    def modules(names: str) -> list[str]:
        return [site.module for site in sites_of(model, Anything(sites=names))]

    assert modules("attn") == modules("encoder.attn") + modules("decoder.attn")
    assert {stack_of(path) for path in modules("decoder.linear decoder.norm")} == {"decoder"}
    assert modules("attn@1") == modules("encoder.attn@1") + modules("decoder.attn@1")
    assert modules("decoder.mlp@last1") == modules("decoder.mlp")[1:]
    assert modules("cross") == modules("decoder.cross")
    with pytest.raises(
        graft.GraftError, match=r"encoder\.cross' matches nothing.*decoder layers 0 to 1, encoder layers 0 to 1"
    ):
        modules("encoder.cross")


def test_a_classifiers_head_is_its_linear_layers_behind_the_base() -> None:
    assert [site.module for site in sites_of(tiny("electra"), Anything(sites="head"))] == [
        "classifier.dense",
        "classifier.out_proj",
    ]
    assert [site.module for site in sites_of(tiny("distilbert"), Anything(sites="head"))] == [
        "pre_classifier",
        "classifier",
    ]
    assert [site.module for site in sites_of(tiny("vit"), Anything(sites="head"))] == ["classifier"]


KINDS = {
    "lora": graft.LoRA(rank=2, sites="linear"),
    "houlsby": graft.Series(bottleneck=4, sites="attn mlp"),
    "parallel": graft.Parallel(bottleneck=4, sites="attn mlp"),
    "prefix": graft.Prefix(tokens=3),
    "cross": graft.Stack(adapters=(graft.Series(bottleneck=4, sites="cross"), graft.Prefix(tokens=2, sites="cross"))),
}


def _outputs(model: Any, family: str, rows: slice = slice(None), **more: Any) -> Tensor:
    with torch.no_grad():
        return model(**{name: tensor[rows] for name, tensor in inputs_of(family).items()}, **more).logits


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", ENCODERS)
def test_rows_of_a_mixed_batch_equal_each_adapter_alone_and_the_base_comes_back(family: str, kind: str) -> None:
    if kind == "cross" and family not in TWO_STACKS:
        pytest.skip("one stack, no attention over another")
    model = tiny(family)
    keys, bare = list(model.state_dict()), _outputs(model, family)
    graft.attach(model, {"a": KINDS[kind], "b": KINDS[kind]})
    if KINDS[kind].starts_as_identity:
        assert torch.equal(_outputs(model, family), bare)
    for name in ("a", "b"):
        for _, parameter in graft.parameters(model, name):
            parameter.data.normal_(std=0.3)
    alone = {}
    for name in ("a", None, "b"):
        with graft.use(model, name):
            alone[name] = _outputs(model, family)
    assert torch.equal(alone[None], bare)
    assert min((alone[name] - bare).abs().max() for name in ("a", "b")) > 1e-2
    with graft.route(model, ["a", None, "b"]):
        if (
            family.startswith("deberta") and kind == "lora"
        ):  # its positions run through q and k (or layers of their own) once for all rows
            with pytest.raises(graft.GraftError, match="the batch has 1 rows, but the routing names 3"):
                _outputs(model, family)
        else:
            mixed = _outputs(model, family)
            for row, name in enumerate(("a", None, "b")):
                assert (mixed[row] - alone[name][row]).abs().max() < 1e-4 * mixed.abs().max().clamp(min=1.0)
    model.train()
    model(**inputs_of(family)).logits.square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for _, p in graft.parameters(model, "a"))
    graft.detach(model)
    assert list(model.state_dict()) == keys
    assert torch.equal(_outputs(model.eval(), family), bare)

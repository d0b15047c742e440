"""Where the residual stream is: read by hooks, and put together again from what the sites say.

r is the residual stream, h what a sublayer adds to it. A block without post-norm gives r + h of its MLP (with h of its attention beside it
where the two run in parallel); one with post-norm gives norm(r + h).
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import graft
from graft.architectures.site import Site
from graft.injection.state import sites_of
from tests.families.test_sublayers import NORMS
from tests.families.zoo import ENDS, OTHERS, TABLE, batch, tiny

FAMILIES = (*TABLE, *OTHERS)

TWO = ("input_layernorm", "post_attention_layernorm")
KNOWN = {
    **NORMS, "gpt_bigcode": ("ln_1", "ln_2"), "granite": TWO, "glm": TWO, "mixtral": TWO,
    **dict.fromkeys(("olmo2", "exaone4"), ("post_attention_layernorm", "post_feedforward_layernorm")),
}  # fmt: skip


def _tensors(model: Any, sites: list[Site]) -> dict[str, Tensor]:
    """First inputs ("path<") and outputs ("path>") of every module that the sites speak of, in one pass of the bare model."""
    seen: dict[str, Tensor] = {}

    def note(path: str) -> Any:
        def hook(module: Any, args: Any, kwargs: Any, out: Any) -> None:
            given = args[0] if args else kwargs.get("hidden_states", next(iter(kwargs.values())))
            first = out[0] if isinstance(out, tuple) else out
            seen[f"{path}<"], seen[f"{path}>"] = (
                x.clone().reshape(3, -1, x.shape[-1]) for x in (given, first)
            )  # Falcon adds in place

        return hook

    paths = {
        path for site in sites for path in (site.module, site.source, site.residual, site.norm) if path is not None
    }
    handles = [model.get_submodule(path).register_forward_hook(note(path), with_kwargs=True) for path in paths]
    with torch.no_grad():
        model(**batch(padded=False), use_cache=False)
    for handle in handles:
        handle.remove()
    return seen


def _check(model: Any) -> None:
    layers = {site.layer: site for site in sites_of(model, graft.Series(sites="layer"))}
    attn, mlp = ({site.layer: site for site in sites_of(model, graft.Series(sites=name))} for name in ("attn", "mlp"))
    seen = _tensors(model, [*layers.values(), *attn.values(), *mlp.values()])
    for number, layer in layers.items():
        into, out = seen[f"{layer.module}<"], seen[f"{layer.module}>"]
        first, second = attn[number], mlp[number]
        assert torch.equal(seen[f"{first.residual}<"], into)
        stream = seen[f"{second.residual}<"]
        for site in (first, second):
            if site.residual != site.source:
                assert torch.equal(seen[f"{site.residual}>"], seen[f"{site.source}<"])
        if first.norm is not None:
            assert torch.equal(stream, seen[f"{first.norm}>"])
            assert (seen[f"{first.norm}<"] - (into + seen[f"{first.module}>"])).abs().max() < 1e-5
            assert (seen[f"{second.norm}<"] - (stream + seen[f"{second.module}>"])).abs().max() < 1e-5
            assert torch.equal(out, seen[f"{second.norm}>"])
        else:
            assert second.norm is None
            parallel = torch.equal(stream, into)
            rebuilt = stream + seen[f"{second.module}>"] + (seen[f"{first.module}>"] if parallel else 0)
            assert (out - rebuilt).abs().max() < 1e-4


@pytest.mark.parametrize("family", FAMILIES)
def test_the_stream_and_what_the_sublayers_add_make_the_block(family: str) -> None:
    _check(tiny(family))


def test_opt_with_norms_behind_the_addition() -> None:
    model = tiny("opt", do_layer_norm_before=False)
    assert sites_of(model, graft.Series(sites="attn"))[0].norm == "model.decoder.layers.0.self_attn_layer_norm"
    _check(model)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_norm_of_a_sublayer_is_the_one_that_is_known(family: str) -> None:
    model = tiny(family)
    for name, expected in zip(("norm.attn", "norm.mlp"), KNOWN[family], strict=True):
        sites = sites_of(model, _Norms(sites=name))
        assert {site.type for site in sites} == {"norm"}
        assert all(site.module.endswith(expected) for site in sites)


class _Norms(graft.Series):
    takes = frozenset({"norm"})


def test_bloom_whose_residual_is_the_norms_output() -> None:
    model = tiny("bloom", **{**ENDS, "apply_residual_connection_post_layernorm": True})
    for site in sites_of(model, graft.Series(sites="attn mlp")):
        assert site.residual == site.source
        assert site.norm is None

"""What `attn`, `mlp` and `layer` mean, proved by adapters that remove a sublayer or replace it by its input.

h is what the block adds to its residual, so h' = h - h leaves the residual as it was; x is what the block's own norm gives the sublayer.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import graft
from graft.architectures.sites import SiteTable
from graft.injection.state import sites_of
from tests.families.zoo import OTHERS, TABLE, batch, tiny

TWO_NORMS = ("input_layernorm", "post_attention_layernorm")
NORMS: dict[str, tuple[str, str]] = {
    **dict.fromkeys(("llama", "mistral", "qwen2", "qwen3", "gemma", "phi3", "gpt_neox", "bloom", "falcon-mha", "stablelm"), TWO_NORMS),
    **dict.fromkeys(("gemma2", "gemma3_text"), ("input_layernorm", "pre_feedforward_layernorm")),
    **dict.fromkeys(("phi", "falcon-mq", "cohere"), ("input_layernorm", "input_layernorm")),
    "opt": ("self_attn_layer_norm", "final_layer_norm"),
    "gpt2": ("ln_1", "ln_2"),
    "gptj": ("ln_1", "ln_1"),
    "falcon": ("ln_attn", "ln_mlp"),
    "starcoder2": TWO_NORMS,
    **dict.fromkeys(("olmo2", "exaone4"), ("", "")),
    "glm4": ("input_layernorm", "post_attention_layernorm"),
    "codegen": ("ln_1", "ln_1"),
    "xglm": ("self_attn_layer_norm", "final_layer_norm"),
    "gpt_neo": ("ln_1", "ln_2"),
    "mpt": ("norm_1", "norm_2"),
}  # fmt: skip
"""The norms, by name in the block, that give attention and MLP their input; OLMo 2 and EXAONE 4 have none there."""

EXACT = {"bottleneck": 32, "activation": "linear", "biases": False}


def _set(model: Any, name: str, down: float, up: float) -> None:
    """Make every bottleneck of an adapter the map u -> down * up * u."""
    for key, parameter in graft.parameters(model, name):
        parameter.data.copy_(torch.eye(32) * (up if key.endswith("up.weight") else down))


def _blocks(model: Any, **inputs: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Input and output of every block."""
    seen: list[tuple[Tensor, Tensor]] = []

    def note(module: Any, args: Any, kwargs: Any, out: Any) -> None:
        given = args[0] if args else kwargs["hidden_states"]
        seen.append((given, out[0] if isinstance(out, tuple) else out))

    path = next(site.module for site in sites_of(model, graft.Series(sites="layer"))).rsplit(".", 1)[0]
    handles = [block.register_forward_hook(note, with_kwargs=True) for block in model.get_submodule(path)]
    with torch.no_grad():
        model(**inputs, use_cache=False)
    for handle in handles:
        handle.remove()
    return seen


RESOLVED = (*TABLE, "stablelm", "cohere", "olmo2", "exaone4", "glm4", "starcoder2", "mpt", "codegen", "xglm", "gpt_neo")


@pytest.mark.parametrize("family", RESOLVED)
def test_without_attention_and_mlp_a_block_gives_back_its_input(family: str) -> None:
    model = tiny(family)
    graft.attach(model, {"off": graft.Series(sites="attn mlp", **EXACT)})
    _set(model, "off", 1.0, -1.0)
    for before, after in _blocks(model, **batch(padded=False)):
        assert (after - before).abs().max() < 1e-5
    with graft.use(model, None):
        for before, after in _blocks(model, **batch(padded=False)):
            assert (after - before).abs().max() > 1e-2


@pytest.mark.parametrize("sublayer", ["attn", "mlp"])
@pytest.mark.parametrize("family", RESOLVED)
def test_a_sublayer_replaced_by_its_input_adds_the_normed_residual(family: str, sublayer: str) -> None:
    model = tiny(family)
    parts = [graft.Series(sites="attn mlp", **EXACT), graft.Parallel(sites=sublayer, **EXACT)]
    graft.attach(model, {"swap": parts})
    _set(model, "swap", 1.0, -1.0)
    for key, parameter in graft.parameters(model, "swap"):
        if f".{sublayer}_1." in key:
            parameter.data.copy_(torch.eye(32))
    norm = NORMS[family][sublayer == "mlp"]
    seen = _blocks(model, **batch(padded=False))
    path = next(site.module for site in sites_of(model, graft.Series(sites="layer"))).rsplit(".", 1)[0]
    with torch.no_grad(), graft.use(model, None):
        for block, (before, after) in zip(model.get_submodule(path), seen, strict=True):
            expected = before + (block.get_submodule(norm)(before) if norm else before)
            assert (after - expected).abs().max() < 1e-4


@pytest.mark.parametrize("family", TABLE)
def test_a_layer_is_the_whole_block(family: str) -> None:
    model = tiny(family)
    graft.attach(model, {"off": graft.Series(sites="layer", **EXACT)})
    _set(model, "off", 1.0, -1.0)
    assert all(after.abs().max() < 1e-5 for _, after in _blocks(model, **batch(padded=False)))
    graft.detach(model)
    graft.attach(model, {"twice": graft.Parallel(sites="layer@1", **EXACT)})
    _set(model, "twice", 1.0, 1.0)
    (_, first), (before, after) = _blocks(model, **batch(padded=False))
    with graft.use(model, None):
        plain = _blocks(model, **batch(padded=False))[1][1]
    assert torch.equal(first, before)
    assert (after - (plain + before)).abs().max() < 1e-5


@pytest.mark.parametrize("family", TABLE)
def test_series_before_changes_what_the_sublayer_reads(family: str) -> None:
    model = tiny(family)
    graft.attach(model, {"zero": graft.Series(sites="attn", position="before", **EXACT)})
    _set(model, "zero", 1.0, -1.0)
    seen: list[Tensor] = []
    linear = "attn.qkv" if "attn.qkv" in SiteTable(model).names() else "attn.v"
    for site in sites_of(model, graft.LoRA(sites=linear)):
        model.get_submodule(site.module).register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    with torch.no_grad():
        model(**batch(padded=False), use_cache=False)
    assert len(seen) == 2
    assert all(x.abs().max() < 1e-6 for x in seen)


def test_the_families_here_are_all_there_are() -> None:
    assert set(RESOLVED) <= set(NORMS) <= {*TABLE, *OTHERS}

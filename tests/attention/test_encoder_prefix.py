"""A virtual token whose key and value are those of a real token in front of the sequence does what that token does.

One layer, so that nothing else of the real token reaches the others. Where positions count (rotary, learned, relative), the sequence
starts behind it (`after_prefix`); attention over the encoder and DeBERTa's content part know no positions.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

import graft
from graft.injection.state import sites_of
from tests.families.zoo import batch, inputs_of, tiny

ONE = {"bart": {"encoder_layers": 1, "decoder_layers": 1}, "distilbert": {"n_layers": 1}}
POSITIONS = {"modernbert": "after_prefix", "bert": "after_prefix", "roberta": "after_prefix", "electra": "after_prefix",
             "t5": "after_prefix", "mt5": "after_prefix"}  # fmt: skip


def _one(family: str, **changes: Any) -> Any:
    scale = 2.0 if family in ("t5", "mt5") else 6.0  # T5 does not scale its scores down
    return tiny(family, scale=scale, **ONE.get(family, {"num_hidden_layers": 1}), **changes)


def _with_prefix_of(model: Any, place: str, positions: str, run: Any) -> list[str]:
    """Attach a prefix of one token at a place, whose key and value are what the linear layers gave for the first token in `run`."""
    config = graft.Prefix(tokens=1, positions=positions, sites=place)
    sites, seen = sites_of(model, config), {}
    base = place.rpartition(".")[2]
    for site in sites:
        names = [graft.LoRA(sites=f"{place.replace(base, f'{base}.{part}')}@{site.layer}") for part in "kv"]
        for part, found in zip(("keys", "values"), (sites_of(model, name)[0] for name in names), strict=True):

            def note(
                module: Any,
                args: Any,
                out: Tensor,
                key: str = f"{site.module}.prefix.{part}",
                rows: Any = found.features,
            ) -> None:
                seen[key] = out[0, :1] if rows is None else out[0, :1, rows]

            model.get_submodule(found.module).register_forward_hook(note)
    with torch.no_grad():
        run()
    for module in model.modules():
        module._forward_hooks.clear()
    graft.attach(model, {"a": config})
    for name, parameter in graft.parameters(model, "a"):
        parameter.data.copy_(seen[name].reshape(parameter.shape))
        host = model.get_submodule(name.rpartition(".prefix.")[0])
        if name.endswith("values") and hasattr(host, "v_bias"):  # DeBERTa's, which its fused projection does not have
            parameter.data.add_(host.v_bias.view(parameter.shape))
    return [site.module for site in sites]


@pytest.mark.parametrize("family", ["bert", "roberta", "electra", "modernbert", "deberta", "deberta-v2"])
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_in_an_encoder(family: str, attention: str) -> None:
    if family.startswith("deberta") and attention == "sdpa":
        pytest.skip("DeBERTa has one attention")
    changes = {"relative_attention": False} if family.startswith("deberta") else {}
    model = _one(family, attention=None if family.startswith("deberta") else attention, **changes)
    model = getattr(model, model.base_model_prefix)
    ids = batch(1, 8, padded=False)["input_ids"]
    whole = model(input_ids=ids).last_hidden_state.detach()
    positions = POSITIONS.get(family, "zero")
    _with_prefix_of(model, "attn", positions, lambda: model(input_ids=ids))
    given = {} if positions == "after_prefix" else {"position_ids": torch.arange(1, 8)[None]}
    for mask in (None, torch.ones(1, 7, dtype=torch.long)):
        with torch.no_grad():
            got = model(input_ids=ids[:, 1:], attention_mask=mask, **given).last_hidden_state
        assert (got - whole[:, 1:]).abs().max() < 1e-5


@pytest.mark.parametrize("family", ["t5", "mt5"])
@pytest.mark.parametrize("stack", ["encoder", "decoder"])
def test_in_both_stacks_of_t5(family: str, stack: str) -> None:
    model = _one(family)
    owner = getattr(model, stack)
    ids, more = batch(1, 8, padded=False)["input_ids"], {}
    if stack == "decoder":
        more = {"encoder_hidden_states": torch.randn(1, 4, 32, generator=torch.Generator().manual_seed(0))}
    whole = owner(input_ids=ids, use_cache=False, **more).last_hidden_state.detach()
    _with_prefix_of(model, f"{stack}.attn", "after_prefix", lambda: owner(input_ids=ids, use_cache=False, **more))
    with torch.no_grad():
        got = owner(input_ids=ids[:, 1:], use_cache=False, **more).last_hidden_state
    assert (got - whole[:, 1:]).abs().max() < 1e-5


@pytest.mark.parametrize("family", ["t5", "bart"])
def test_in_attention_over_the_encoder(family: str) -> None:
    model = tiny(family, scale=2.0)
    inputs = batch(1, 5, padded=False)["input_ids"]
    states = torch.randn(1, 4, 32, generator=torch.Generator().manual_seed(0))

    def run(first: int = 0) -> Tensor:
        return model(encoder_outputs=(states[:, first:],), decoder_input_ids=inputs, use_cache=False).logits

    whole = run().detach()
    places = _with_prefix_of(model, "decoder.cross", "zero", run)
    assert len(places) == 2
    with torch.no_grad():
        assert (run(1) - whole).abs().max() < 1e-5
        with graft.use(model, None):
            assert (run(1) - whole).abs().max() > 1e-3


class _EmptyToken(TorchFunctionMode):
    """Every softmax over the last dimension gets one more column in front, of score 0, which is then dropped."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (torch.softmax, torch.nn.functional.softmax):
            scores = torch.nn.functional.pad(args[0], (1, 0))
            return func(scores, *args[1:], **(kwargs or {}))[..., 1:]
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("family", ["deberta", "deberta-v2"])
def test_debertas_positions_stay_as_they_are_beside_virtual_tokens(family: str) -> None:
    model = tiny(family)
    inputs = inputs_of(family)
    with torch.no_grad(), _EmptyToken():
        expected = model(**inputs).logits
    graft.attach(model, {"a": graft.Prefix(tokens=1)})
    for _, parameter in graft.parameters(model, "a"):
        parameter.data.zero_()
    seen = inputs["attention_mask"].bool()
    with torch.no_grad():
        assert (model(**inputs).logits - expected)[seen].abs().max() < 1e-5
        with graft.use(model, None):
            assert (model(**inputs).logits - expected)[seen].abs().max() > 1e-2


@pytest.mark.parametrize("family", ["t5", "bart"])
@pytest.mark.parametrize("positions", ["zero", "after_prefix", "moved_keys"])
def test_generating_with_and_without_a_cache_is_the_same(family: str, positions: str) -> None:
    if family == "bart" and positions != "zero":
        with pytest.raises(graft.GraftError, match="takes no position ids|which BartFor.* does not have"):
            graft.attach(tiny(family), {"a": graft.Prefix(tokens=2, positions=positions)})
        return
    model = tiny(family, scale=2.0)
    graft.attach(model, {"a": graft.Stack(adapters=(
        graft.Prefix(tokens=3, positions=positions, sites="attn"), graft.Prefix(tokens=2, sites="cross")))})  # fmt: skip
    for _, parameter in graft.parameters(model, "a"):
        parameter.data.normal_()
    inputs = batch(3, 6)
    settings = {
        "max_new_tokens": 6,
        "min_new_tokens": 6,
        "do_sample": False,
        "return_dict_in_generate": True,
        "output_logits": True,
    }
    with torch.no_grad():
        cached, whole = (model.generate(**inputs, use_cache=use, **settings) for use in (True, False))
        beams = [
            model.generate(**inputs, use_cache=use, num_beams=3, max_new_tokens=5, do_sample=False)
            for use in (True, False)
        ]
    assert torch.equal(cached.sequences, whole.sequences)
    for one, other in zip(cached.logits, whole.logits, strict=True):
        assert (one - other).abs().max() < 1e-4
    assert torch.equal(*beams)


def test_a_prefix_in_vit_is_a_token_in_front() -> None:
    model = tiny("vit")
    module = model.vit.layers[0].attention
    x = torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        whole = module(x.roll(0))[0]
        keys, values = (layer(x)[:, :1].view(2, 4, 8) for layer in (module.k_proj, module.v_proj))
        graft.attach(model, {"a": graft.Prefix(tokens=1, sites="attn@0"), "b": graft.Prefix(tokens=1, sites="attn@0")})
        for row, name in enumerate("ab"):
            for (_, parameter), given in zip(graft.parameters(model, name), (keys, values), strict=True):
                parameter.copy_(given[row][None])
        with graft.route(model, ["a", "b"]):
            assert (module(x[:, 1:])[0] - whole[:, 1:]).abs().max() < 1e-5

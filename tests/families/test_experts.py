"""LoRA on experts that are held as three-dimensional parameters, against PEFT and against each row alone."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn

import graft
from graft.architectures.sites import SiteTable
from graft.attention import flat_attention
from graft.injection.state import sites_of
from graft.routing.context import ForwardContext
from tests.architectures import build
from tests.families.zoo import tiny

FAMILIES = ("mixtral", "qwen2_moe", "qwen3_moe", "gpt_oss", "deepseek_v3", "granitemoe", "jamba")
"""gpt_oss stores its weights [E, I, O] and adds biases."""
LORA = graft.LoRA(rank=2, alpha=6, sites="linear")
EXPERTS = graft.LoRA(rank=2, alpha=6, sites="experts.gate_up experts.down")


def _model(family: str) -> Any:
    model = build(family).requires_grad_(False)  # Jamba rounds otherwise where its weights take gradients
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(6.0)
    return model


def _randomise(model: Any, name: str, seed: int = 0) -> None:
    generator = torch.Generator().manual_seed(seed)
    for _, parameter in graft.parameters(model, name):
        parameter.data.normal_(std=0.3, generator=generator)


def _batch(padded: bool = True) -> dict[str, Tensor]:
    ids = (torch.arange(24) * 7 % 59 + 3).view(3, 8)
    mask = torch.ones_like(ids)
    if padded:
        mask[1, :3] = 0
    return {"input_ids": ids, "attention_mask": mask}


def _logits(model: Any, **inputs: Tensor) -> Tensor:
    with torch.no_grad():
        return model(**(inputs or _batch()), use_cache=False).logits


@pytest.mark.parametrize("family", FAMILIES)
def test_every_expert_weight_has_a_name_and_belongs_to_linear(family: str) -> None:
    model = _model(family)
    held = {name for name, parameter in model.named_parameters() if parameter.dim() == 3 and "experts" in name}
    assert held
    sites = sites_of(model, EXPERTS)
    assert {f"{site.module}.{site.part}_proj" for site in sites} == held
    assert {site for site in sites_of(model, LORA) if site.type == "experts"} >= set()
    assert {f"{site.module}.{site.part}_proj" for site in sites_of(model, LORA) if site.type == "experts"} == held
    for site in sites:
        shape = model.get_submodule(site.module).get_parameter(f"{site.part}_proj").shape
        assert sorted((site.num_experts, site.in_features, site.out_features)) == sorted(shape)
    assert {"experts.gate_up", "experts.down"} <= SiteTable(model).names()


@pytest.mark.parametrize("family", FAMILIES)
def test_outputs_and_gradients_are_those_of_peft(family: str) -> None:
    model, base = _model(family), _model(family)
    bare = _logits(model)
    graft.attach(model, {"a": EXPERTS})
    assert torch.equal(_logits(model), bare)
    names = sorted({f"{site.module.rpartition('.')[2]}.{site.part}_proj" for site in sites_of(model, EXPERTS)})
    settings = peft.LoraConfig(r=2, lora_alpha=6, target_modules=[], target_parameters=names)
    theirs = peft.get_peft_model(base, settings).eval()
    _randomise(model, "a")
    pairs = []
    for name, parameter in graft.parameters(model, "a"):
        module, part, side = name.rsplit(".", 2)
        wrapped = theirs.get_submodule(f"base_model.model.{module}")
        while wrapped.parameter_name != f"{part}_proj":
            wrapped = wrapped.base_layer
        weight = getattr(wrapped, f"lora_{side}")["default"].weight
        given = parameter.flatten(0, 1) if side == "A" else parameter.permute(1, 2, 0).flatten(1)
        weight.data.copy_(given)
        pairs.append((side, parameter, weight))
    assert (_logits(model) - bare).abs().max() > 1e-2
    assert (_logits(model) - _logits(theirs)).abs().max() < 1e-4 * bare.abs().max().clamp(min=1.0)
    for each in (model, theirs):
        each(**_batch(), use_cache=False).logits.square().mean().backward()
    for side, mine, other in pairs:
        assert mine.grad is not None and other.grad is not None
        given = mine.grad.flatten(0, 1) if side == "A" else mine.grad.permute(1, 2, 0).flatten(1)
        assert (given - other.grad).abs().max() < 1e-4 * other.grad.abs().max()


@pytest.mark.parametrize("family", [*FAMILIES, "llama4_text"])
def test_rows_of_a_mixed_batch_equal_each_adapter_alone(family: str) -> None:
    model = _model(family)
    graft.attach(model, {"a": LORA, "b": LORA})
    for seed, name in enumerate("ab"):
        _randomise(model, name, seed)
    alone = {}
    for name in ("a", None, "b"):
        with graft.use(model, name):
            alone[name] = _logits(model)
    with graft.route(model, ["a", None, "b"]):
        mixed = _logits(model)
    for row, name in enumerate(("a", None, "b")):
        seen = _batch()["attention_mask"][row].bool()
        assert (mixed[row] - alone[name][row])[seen].abs().max() < 1e-4 * mixed.abs().max().clamp(min=1.0)
    assert min((alone[name] - alone[None]).abs().max() for name in ("a", "b")) > 1e-2


def test_segments_of_a_token_flat_batch_equal_each_adapter_alone() -> None:
    model = _model("mixtral")
    graft.attach(model, {"a": EXPERTS, "b": EXPERTS})
    for seed, name in enumerate("ab"):
        _randomise(model, name, seed)
    ids, lengths, names = torch.arange(3, 15)[None], (5, 4, 3), ("a", None, "b")
    positions = torch.cat([torch.arange(length) for length in lengths])[None]
    with (
        torch.no_grad(),
        flat_attention(model),
        model.graft_state.entered(ForwardContext(names, lengths=lengths, flat=True)),
    ):
        flat = model(input_ids=ids, position_ids=positions, use_cache=False).logits
    for part, name, whole in zip(ids.split(lengths, 1), names, flat.split(lengths, 1), strict=True):
        with graft.use(model, name):
            assert (_logits(model, input_ids=part) - whole).abs().max() < 1e-4


def test_beams_of_routed_rows_are_those_of_each_row_alone() -> None:
    model = _model("mixtral")
    graft.attach(model, {"a": EXPERTS, "b": EXPERTS})
    for seed, name in enumerate("ab"):
        _randomise(model, name, seed)
    inputs = _batch(padded=False)
    settings = {"num_beams": 3, "max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}
    with torch.no_grad(), graft.route(model, ["a", None, "b"]):
        routed = model.generate(**inputs, **settings)
    for row, name in enumerate(("a", None, "b")):
        with torch.no_grad(), graft.use(model, name):
            alone = model.generate(**{key: item[row : row + 1] for key, item in inputs.items()}, **settings)
        assert torch.equal(routed[row], alone[0])


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss"])
def test_merge_unmerge_save_load_and_detach(family: str, tmp_path: Path) -> None:
    model = _model(family)
    weights = copy.deepcopy(model.state_dict())
    graft.attach(model, {"a": EXPERTS})
    _randomise(model, "a")
    expected = _logits(model)
    graft.merge(model, "a")
    assert (_logits(model) - expected).abs().max() < 1e-4
    graft.unmerge(model, "a")
    assert torch.equal(_logits(model), expected)
    graft.save(model, "a", tmp_path)
    graft.detach(model)
    assert list(model.state_dict()) == list(weights)
    assert all(torch.equal(tensor, weights[name]) for name, tensor in model.state_dict().items())
    fresh = _model(family)
    graft.load(fresh, tmp_path, name="b")
    assert torch.equal(_logits(fresh), expected)


def test_checkpointed_blocks_give_the_same_gradients_after_the_context_was_left() -> None:
    grads = []
    for checkpointed in (False, True):
        model = _model("mixtral")
        graft.attach(model, {"a": EXPERTS, "b": EXPERTS})
        for seed, name in enumerate("ab"):
            _randomise(model, name, seed)
        graft.set_active(model, "a")
        model.train()
        if checkpointed:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        loss = model(**_batch(), use_cache=False).logits.square().mean()
        with graft.use(model, None):
            loss.backward()
        grads.append([parameter.grad for _, parameter in graft.parameters(model, "a")])
    for one, other in zip(*grads, strict=True):
        assert (one - other).abs().max() < 1e-5 * one.abs().max()


def test_kinds_that_take_no_experts_say_what_they_leave_out() -> None:
    model = _model("mixtral")
    with pytest.warns(
        UserWarning,
        match=r"kind 'series' at 'linear' does not adapt 4 weights \(such as model\.layers\.0\.mlp\.experts",
    ):
        graft.attach(model, {"a": graft.Series(bottleneck=2, sites="linear")})
    with pytest.raises(graft.GraftError, match="'experts.down' is a experts site|takes .* sites; 'experts.down'"):
        graft.attach(model, {"b": graft.Series(bottleneck=2, sites="experts.down")})


class _ListOfExperts(nn.Module):
    """Experts as remote code has them: linear layers in a list, each of which sees the tokens chosen for it."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.experts = nn.ModuleList([nn.Linear(width, width) for _ in range(2)])

    def forward(self, x: Tensor) -> Tensor:
        tokens, out = x.flatten(0, 1), torch.zeros_like(x.flatten(0, 1))
        for number, expert in enumerate(self.experts):
            chosen = torch.arange(number, len(tokens), 2)
            out[chosen] = expert(tokens[chosen])
        return out.view_as(x)


def test_rows_are_not_routed_through_a_list_of_experts_whose_tokens_do_not_say_whose_they_are() -> None:
    model = tiny("llama")
    for layer in model.model.layers:
        layer.mlp = _ListOfExperts(model.config.hidden_size)
    for name in ("a", "b"):
        graft.attach(model, {name: graft.LoRA(rank=2, sites=r"re:.*experts\.\d")})
        _randomise(model, name)
    with graft.use(model, None):
        bare = _logits(model)
    with graft.use(model, "a"):
        assert not torch.allclose(_logits(model), bare)
    whose = pytest.raises(graft.GraftError, match="passes 12 tokens to this layer")
    with whose, graft.route(model, ["a", "b", None]):
        _logits(model)

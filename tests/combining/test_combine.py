"""One adapter made of several: equal to PEFT's `add_weighted_adapter` for LoRA, and to the sum of differences for what adds to weights."""

from __future__ import annotations

import copy
from typing import Any

import peft
import pytest
import torch
from torch import Tensor

import graft
from graft.errors import GraftError
from graft.injection.state import state_of
from tests.contract.table import base, base_tensors, ids, logits, with_adapters

PEFT_WAY = {"magnitude-prune": "magnitude_prune", "dare": "dare_linear", "dare-ties": "dare_ties"}
MODULES = {"llama": ["q_proj", "down_proj"], "gpt2": ["c_attn", "mlp.c_proj"]}
SITES = {"llama": "attn.q mlp.down", "gpt2": "attn.qkv mlp.down"}


def in_peft(model: Any, family: str, names: list[str]) -> Any:
    """PEFT's model with LoRAs of these names that have the same factors."""
    found = None
    for name in names:
        config: Any = state_of(model).adapters[name].config
        own = peft.LoraConfig(
            r=config.rank, lora_alpha=config.alpha, use_rslora=config.rslora, target_modules=MODULES[family],
            rank_pattern={key: value for key, value in config.rank_pattern.items()}, fan_in_fan_out=family == "gpt2",
        )  # fmt: skip
        if found is None:
            found = peft.get_peft_model(base(family), own, adapter_name=name)
        else:
            found.add_adapter(name, own)
    assert found is not None
    own_modules = dict(found.base_model.model.named_modules())
    for name in names:
        for each in state_of(model).adapters[name].installs:
            host: Any = own_modules[each.site.module]
            host.lora_A[name].weight.data = each.module.A.detach().clone()
            host.lora_B[name].weight.data = each.module.B.detach().clone()
    return found


def pair(family: str, **changes: Any) -> Any:
    lora = {"kind": "lora", "rank": 4, "alpha": 6.0, "sites": SITES[family]}
    return with_adapters(family, a=lora, b={**lora, "alpha": 3.0, "rslora": True, **changes}, c={**lora, "alpha": 8.0})


WEIGHTS = [(1.0, 1.0), (0.3, -1.7), (2.0, 0.0), (-0.5, -0.25)]


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize(
    "how", ["cat", "svd", "linear", "ties", "magnitude-prune", "ties on differences", "magnitude-prune on differences"]
)
def test_loras_equal_peft(family: str, how: str) -> None:
    way, _, on = how.partition(" on ")
    theirs = PEFT_WAY.get(way, way) + ("_svd" if on else "")
    for number, weights in enumerate(WEIGHTS):
        names = ["a", "b", "c"][: 2 + number % 2]
        weights = (*weights, 0.7)[: len(names)]
        density = (0.5, 0.2, 0.9, 1.0)[number]
        model = pair(family, rank=3 if way in ("cat", "svd") or on else 4)
        reference = in_peft(model, family, names)
        rank = 5 if on or way == "svd" else None
        reference.add_weighted_adapter(
            names, list(weights), "both", combination_type=theirs, density=density, svd_rank=rank
        )
        pruned = None if way in ("cat", "svd", "linear") else density
        chosen = dict(zip(names, weights, strict=True))
        report = graft.combine(model, chosen, "both", how=way, on=on or None, rank=rank, density=pruned)
        theirs_by_path = dict(reference.base_model.model.named_modules())
        for each in state_of(model).adapters["both"].installs:
            wanted = theirs_by_path[each.site.module].get_delta_weight("both")  # as the layer stores its weight
            found = each.module.difference()
            torch.testing.assert_close(found, wanted.t() if family == "gpt2" else wanted, atol=1e-5, rtol=1e-5)
        assert report.how == way


def test_random_pruning_keeps_a_share_and_the_mean() -> None:
    """DARE draws at random, in PEFT too, so what is compared is the law: entries are zero or divided by the density, and the mean stays."""
    model = pair("llama", alpha=6.0, rslora=False)
    total: Any = 0.0
    first = state_of(model).adapters["a"].installs[0].module
    second = state_of(model).adapters["b"].installs[0].module
    for seed in range(200):
        graft.combine(model, {"a": 1.0, "b": 1.0}, "both", how="dare", density=0.25, seed=seed)
        total = total + state_of(model).adapters["both"].installs[0].module.A.detach() / 200
        graft.detach(model, "both")
    wanted = (first.A + second.A).detach() * 1.5**0.5  # scale 6 / 4
    assert float((total - wanted).norm() / wanted.norm()) < 4 * (3 / 200) ** 0.5 / 1.5
    graft.combine(model, {"a": 1.0, "b": 0.0}, "both", how="dare", density=0.25, seed=1)
    A = state_of(model).adapters["both"].installs[0].module.A.detach()
    kept = A != 0
    assert 0.1 < float(kept.float().mean()) < 0.4
    torch.testing.assert_close(A[kept], (first.A.detach() * 1.5**0.5 * 4)[kept])


def merged(model: Any, name: str) -> dict[str, Tensor]:
    plain = {key: tensor.clone() for key, tensor in base_tensors(model)}
    twin = copy.deepcopy(model)
    graft.merge(twin, name)
    return {key: tensor - plain[key] for key, tensor in base_tensors(twin) if tensor.is_floating_point()}


KINDS: dict[str, dict[str, Any]] = {
    "lora": {"kind": "lora", "rank": 2},
    "dora": {"kind": "dora", "rank": 3},
    "pissa": {"kind": "pissa", "rank": 2},
    "loha": {"kind": "loha", "rank": 2},
    "vera": {"kind": "vera", "rank": 4},
    "miss": {"kind": "miss", "rank": 4},
    "oft": {"kind": "oft", "block_size": 4},
    "ia3": {"kind": "ia3"},
}


@pytest.mark.parametrize(
    ("one", "other"), [("lora", "dora"), ("loha", "vera"), ("pissa", "miss"), ("oft", "lora"), ("ia3", "dora")]
)
def test_differences_of_any_kinds_are_summed_by_svd(one: str, other: str) -> None:
    model = with_adapters(
        "llama", a={**KINDS[one], "sites": "attn.q mlp.down"}, b={**KINDS[other], "sites": "attn.q attn.v"}
    )
    report = graft.combine(model, {"a": 0.5, "b": -2.0}, "both", how="svd", rank=64)
    assert report.error == pytest.approx(0.0, abs=1e-4)
    assert report.input_changed_by == (("a",) if one == "oft" or one == "ia3" else ())
    deltas = [merged(model, name) for name in "ab"]
    found = merged(model, "both")
    for key in found:
        torch.testing.assert_close(found[key], 0.5 * deltas[0][key] - 2.0 * deltas[1][key], atol=2e-4, rtol=1e-3)
    lossy = graft.combine(model, {"a": 0.5, "b": -2.0}, "lossy", how="svd", rank=2)
    left = {key: merged(model, "lossy")[key] - found[key] for key in found}
    sizes = [sum(float(each.square().sum()) for each in some.values()) for some in (left, found)]
    assert lossy.error == pytest.approx((sizes[0] / sizes[1]) ** 0.5, rel=1e-2)
    assert lossy.worst is not None and lossy.error is not None and lossy.worst >= lossy.error > 0.01


def test_side_by_side_equals_both_on_one_row() -> None:
    model = with_adapters(
        "gpt2",
        a={"kind": "lora", "rank": 2, "sites": "attn.q"},
        b={"kind": "lora", "rank": 5, "sites": "attn.q embed mlp.up"},
    )
    report = graft.combine(model, {"a": 0.5, "b": 1.5}, "both")
    assert (report.rank, report.error) == (7, None)  # an embedding's table is no linear layer
    with graft.use(model, {"a": 0.5, "b": 1.5}):
        wanted = logits(model, ids())
    with graft.use(model, "both"):
        torch.testing.assert_close(logits(model, ids()), wanted, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", ["series", "prefix", "parallel", "prompt", "llama-adapter", "reft"])
def test_parameters_of_equal_adapters_are_averaged(kind: str) -> None:
    model = with_adapters("llama", a=kind, b=kind)
    report = graft.combine(model, ["a", "b"], "mean", how="linear")
    assert report.on == "parameters" and report.weights == {"a": 0.5, "b": 0.5}
    tensors = {name: dict(graft.parameters(model, name)) for name in ("a", "b", "mean")}
    for key, tensor in tensors["mean"].items():
        torch.testing.assert_close(tensor, (tensors["a"][key] + tensors["b"][key]) / 2)


def test_the_distance_of_a_large_combination_is_a_number() -> None:
    report = graft.combine(with_adapters("llama", a=LORA, b=LORA), {"a": 1e30, "b": 1e30}, "both")
    assert report.error is not None and report.error < 1e-6


def test_a_combination_is_an_adapter_like_any_other(tmp_path: Any) -> None:
    model = pair("llama")
    graft.combine(model, {"a": 1.0, "c": -0.5}, "both", how="linear")
    with graft.use(model, "both"):
        wanted = logits(model, ids())
    graft.save(model, "both", tmp_path / "both")
    fresh = graft.load(base("llama"), tmp_path / "both", name="again")
    torch.testing.assert_close(logits(fresh, ids()), wanted, atol=0, rtol=0)
    graft.export(fresh, "again", tmp_path / "peft")
    theirs = peft.PeftModel.from_pretrained(base("llama"), tmp_path / "peft")
    torch.testing.assert_close(logits(theirs, ids()), wanted, atol=1e-5, rtol=1e-5)


LORA = {"kind": "lora", "rank": 4, "sites": "attn.q"}
SERIES = {"kind": "series", "bottleneck": 4, "sites": "mlp"}


@pytest.mark.parametrize(
    ("adapters", "settings", "message"),
    [
        (["a"], {}, "made of at least two adapters; given: a"),
        (["a", "a"], {}, "adapter 'a' is named twice"),
        (["a", "z"], {}, "no adapter 'z' is attached"),
        ({"a": 1.0, "b": float("inf")}, {}, "weight of adapter 'b' must be a finite number; given: inf"),
        (["a", "b"], {"how": "mean"}, "no way 'mean' to combine adapters; there is cat, svd, linear"),
        (["a", "b"], {"how": "ties", "density": 0.0}, "above 0 and at most 1; given: 0.0"),
        (["a", "b"], {"how": "svd", "rank": 0}, "a rank is a whole number of at least 1; given: 0"),
        (["a", "b"], {"how": "svd", "rank": 2.5}, "a rank is a whole number of at least 1; given: 2.5"),
        (
            ["a", "b"],
            {"how": "cat", "density": 0.5},
            "density is for magnitude-prune, dare, ties, dare-ties, which prune; cat does not",
        ),
        (
            ["a", "b"],
            {"how": "cat", "rank": 3},
            "rank is for the LoRA that approximates differences; cat on factors keeps ranks",
        ),
        (["s", "u"], {"how": "linear", "rank": 3}, "linear on parameters keeps ranks"),
        ({"a": 1e38, "b": 1e38}, {}, "the combination is not finite at model.layers.0.self_attn.q_proj.linear.B"),
        (["a", "b"], {"how": "linear", "on": "factors"}, "have ranks 2, 4 at model.layers.0.self_attn.q_proj"),
        (["a", "b"], {"how": "svd", "on": "factors"}, "svd approximates differences"),
        (["a", "b"], {"how": "cat", "on": "differences"}, "cat lays factors side by side"),
        (
            ["a", "s"],
            {},
            "'s' is kind series at model.layers.0.mlp.down_proj, and cat on factors is for LoRAs: choose linear",
        ),
        (
            ["a", "a2"],
            {"how": "ties", "density": 1e-3},
            "a density of 0.001 keeps none of 128 entries: choose at least 0.0078",
        ),
        (["s", "t"], {"how": "ties"}, "'s' is of kind series at .* ties does not apply"),
        (["a", "s"], {"how": "linear"}, "equal settings; kind is 'lora' in one and 'series' in the other"),
        (["s", "t"], {"how": "linear"}, "equal settings; bottleneck is 4 in one and 3 in the other"),
        ({"s": 1.0, "u": 1.0}, {"how": "linear"}, "have to add up to 1; they add up to 2"),
    ],
)
def test_what_cannot_be_combined_is_refused(adapters: Any, settings: Any, message: str) -> None:
    model = with_adapters(
        "llama", a=LORA, a2=LORA, b={**LORA, "rank": 2}, s=SERIES, t={**SERIES, "bottleneck": 3}, u=SERIES
    )
    with pytest.raises(GraftError, match=message):
        graft.combine(model, adapters, "both", **settings)
    with pytest.raises(GraftError, match="'b' is attached already"):
        graft.combine(model, ["a", "s"], "b")
    assert "both" not in graft.names(model)

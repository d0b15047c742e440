"""VeRA: PEFT's numbers from PEFT's seed, slices for layers of any size, and shared matrices that are saved unless one says otherwise."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import graft
from tests.adapters.references import Case, Twins
from tests.contract.table import base, ids, logits, randomise

VERA = {"b": "vera_lambda_b.default", "d": "vera_lambda_d.default"}


@pytest.mark.parametrize(
    ("family", "ours", "theirs"),
    [
        ("llama", graft.VeRA(rank=6, seed=3, sites="linear"), {"target_modules": "all-linear"}),
        (
            "llama",
            graft.VeRA(rank=6, seed=3, d_initial=0.4, dropout=0.4, sites="attn.q attn.v"),
            {"target_modules": ["q_proj", "v_proj"], "d_initial": 0.4, "vera_dropout": 0.4},
        ),
        (
            "gpt2",
            graft.VeRA(rank=6, seed=3, sites="attn.qkv mlp.down"),
            {"target_modules": ["c_attn", "mlp.c_proj"], "fan_in_fan_out": True},
        ),
    ],
)
@pytest.mark.parametrize("training", [False, True])
def test_outputs_and_gradients_equal_peft_from_the_seed_alone(
    family: str, ours: Any, theirs: dict[str, Any], training: bool
) -> None:
    peft = pytest.importorskip("peft")
    Twins(family, ours, peft.VeraConfig(r=6, projection_prng_key=3, **theirs), VERA).assert_same(training)


def test_a_fresh_adapter_starts_as_peft_does() -> None:
    peft = pytest.importorskip("peft")
    twins = Twins(
        "llama", graft.VeRA(rank=6, sites="attn.q"), peft.VeraConfig(r=6, target_modules=["q_proj"]), VERA, 0.0
    )
    for key, (mine, _) in twins.pairs.items():
        assert torch.equal(mine, torch.full_like(mine, 0.1 if key.endswith(".d") else 0.0))


@pytest.mark.parametrize("saved", [True, False])
def test_the_shared_matrices_are_in_the_file_unless_one_says_otherwise(saved: bool, tmp_path: Path) -> None:
    model = base("llama")
    graft.attach(model, {"a": graft.VeRA(rank=6, seed=4, save_projection=saved)})
    randomise(model, "a")
    folder = graft.save(model, "a", tmp_path / "a")
    stored = load_file(folder / "adapter_model.safetensors")
    assert ({"shared0.A", "shared0.B"} <= set(stored)) == saved
    if saved:
        assert stored["shared0.A"].shape == (6, 32) and stored["shared0.B"].shape == (32, 6)
    torch.manual_seed(99)
    assert torch.equal(logits(graft.load(base("llama"), folder), ids()), logits(model, ids()))


def test_what_is_drawn_depends_on_the_seed_of_the_config_alone() -> None:
    drawn = []
    for seed, outer in ((1, 0), (1, 5), (2, 0)):
        torch.manual_seed(outer)
        model = base("llama")
        graft.attach(model, {"a": graft.VeRA(rank=6, seed=seed)})
        randomise(model, "a")
        drawn.append(logits(model, ids()))
    assert torch.equal(drawn[0], drawn[1]) and not torch.allclose(drawn[0], drawn[2], atol=1e-3)


@pytest.mark.parametrize("case", ["llama-vera", "llama-vera-noproj"])
def test_files_that_peft_wrote_compute_the_same(case: str, shared: Path) -> None:
    oracle = Case(shared, f"peft/{case}")
    config = oracle.config
    ours = graft.VeRA(
        rank=config["r"],
        seed=config["projection_prng_key"],
        save_projection=config["save_projection"],
        sites="attn.q attn.v",
    )
    graft.attach(oracle.model, {"a": ours})
    names = {"b": "vera_lambda_b", "d": "vera_lambda_d"}
    names |= {"shared.A": "base_model.vera_A", "shared.B": "base_model.vera_B"} if config["save_projection"] else {}
    oracle.fill(names)
    projection = dict(oracle.model._modules["graft"].named_buffers())
    for name in ("A", "B"):
        if f"extra.vera_{name}" in oracle.expected:
            assert torch.equal(projection[f"a.shared0.{name}"], oracle.expected[f"extra.vera_{name}"])
    oracle.assert_matches()


def test_a_file_that_adapterhub_wrote_has_an_equal(shared: Path) -> None:
    """AdapterHub trains whole matrices D [R, R] and B [O, O] in place of the vectors, which a plain LoRA holds: (B B0), (D A0)."""
    oracle = Case(shared, "adapters/bert-vera")
    file, config = oracle.tensors, oracle.config["config"]
    A, B = (file[f"bert.shared_parameters.fx.lora_{name}"] for name in "AB")
    graft.attach(oracle.model, {"a": graft.LoRA(rank=config["r"], alpha=config["alpha"], sites="attn.q attn.v")})
    with torch.no_grad():
        for key, parameter in graft.parameters(oracle.model, "a"):
            site = f"bert.{key.rsplit('.', 2)[0]}.loras.fx"
            parameter.copy_(file[f"{site}.vera_D"] @ A if key.endswith(".A") else file[f"{site}.vera_B"] @ B)
    oracle.assert_matches()

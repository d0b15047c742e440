"""LoHa and LoKr: equal to PEFT in output, gradients, sizes and files, without writing their matrices out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import graft
from graft.adapters.kinds.loha import LoHaAdapter
from graft.adapters.kinds.lokr import factors
from graft.attaching.parameters import modules_of
from graft.injection.state import state_of
from tests.adapters.references import Case, Twins
from tests.contract.table import base, randomise

LOHA = {name: f"hada_{name}.default" for name in ("w1_a", "w1_b", "w2_a", "w2_b")}
LOKR = {name: f"lokr_{name}.default" for name in ("w1", "w2", "w1_a", "w1_b", "w2_a", "w2_b")}
GATE = {"target_modules": ["q_proj", "v_proj", "gate_proj"]}
SITES = "attn.q attn.v mlp.gate"


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (graft.LoHa(rank=3, alpha=5, sites=SITES), {"r": 3}),
        (graft.LoHa(rank=8, alpha=5, sites=SITES), {"r": 8}),
        (
            graft.LoHa(rank=3, alpha=5, rank_pattern={"attn.q": 6}, alpha_pattern={"attn.v": 2}, sites=SITES),
            {"r": 3, "rank_pattern": {"q_proj": 6}, "alpha_pattern": {"v_proj": 2}},
        ),
    ],
)
def test_loha_equals_peft(ours: Any, theirs: dict[str, Any]) -> None:
    peft = pytest.importorskip("peft")
    Twins("llama", ours, peft.LoHaConfig(alpha=5, **GATE, **theirs), LOHA).assert_same()


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (graft.LoKr(rank=2, alpha=5, sites=SITES), {"r": 2}),
        (graft.LoKr(rank=16, alpha=5, sites=SITES), {"r": 16}),
        (graft.LoKr(rank=1, alpha=5, decompose_both=True, sites=SITES), {"r": 1, "decompose_both": True}),
        (graft.LoKr(rank=2, alpha=5, factor=8, sites=SITES), {"r": 2, "decompose_factor": 8}),
        (
            graft.LoKr(rank=2, alpha=5, factor=16, decompose_both=True, sites=SITES),
            {"r": 2, "decompose_factor": 16, "decompose_both": True},
        ),
        (
            graft.LoKr(rank=1, alpha=5, rank_pattern={"attn.q": 4}, alpha_pattern={"attn.v": 2}, sites=SITES),
            {"r": 1, "rank_pattern": {"q_proj": 4}, "alpha_pattern": {"v_proj": 2}},
        ),
    ],
)  # fmt: skip
def test_lokr_equals_peft(ours: Any, theirs: dict[str, Any]) -> None:
    peft = pytest.importorskip("peft")
    Twins("llama", ours, peft.LoKrConfig(alpha=5, **GATE, **theirs), LOKR).assert_same()


def test_sizes_are_split_as_peft_splits_them() -> None:
    pytest.importorskip("peft")
    from peft.tuners.lokr.layer import factorization

    for size in (1, 2, 7, 32, 36, 40, 97, 127, 768, 3072, 4096, 11008):
        for wanted in (None, 1, 2, 3, 4, 8, 10, 16, 50, 64, 1000):
            assert factors(size, wanted) == factorization(size, -1 if wanted is None else wanted), (size, wanted)


@pytest.mark.parametrize("kind", ["loha", "lokr"])
def test_a_fresh_adapter_has_the_zeros_of_peft(kind: str) -> None:
    model = base("llama")
    graft.attach(model, {"a": {"kind": kind, "rank": 2, "sites": "attn.q"}})
    zero = {key.rsplit(".", 1)[1] for key, p in graft.parameters(model, "a") if not p.any()}
    assert zero == {"loha": {"w2_b"}, "lokr": {"w1"}}[kind]


def test_a_small_loha_never_writes_its_matrix_out_and_a_large_one_gives_the_same() -> None:
    model = base("llama")
    graft.attach(model, {"a": graft.LoHa(rank=5, sites="mlp.down")})
    randomise(model, "a")
    for _, module in modules_of(model, state_of(model), "a"):
        assert isinstance(module, LoHaAdapter) and module.factorised
        x = torch.randn(4, 40, generator=torch.Generator().manual_seed(1))
        small = module.apply_to(x)
        module.factorised = False
        torch.testing.assert_close(small, module.apply_to(x), atol=1e-5, rtol=0)


@pytest.mark.parametrize("case", ["llama-loha", "llama-lokr", "llama-lokr-both"])
def test_files_that_peft_wrote_compute_the_same(case: str, shared: Path) -> None:
    oracle = Case(shared, f"peft/{case}")
    config = oracle.config
    spec: dict[str, Any] = {"rank": config["r"], "alpha": config["alpha"], "sites": "attn.q attn.v"}
    if config["peft_type"] == "LOKR":
        factor = None if config["decompose_factor"] == -1 else config["decompose_factor"]
        spec |= {"decompose_both": config["decompose_both"], "factor": factor}
    graft.attach(oracle.model, {"a": {"kind": config["peft_type"].lower(), **spec}})
    names = LOHA if config["peft_type"] == "LOHA" else LOKR
    oracle.fill({ours: theirs.removesuffix(".default") for ours, theirs in names.items()})
    oracle.assert_matches()

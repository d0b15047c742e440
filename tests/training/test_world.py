"""Two processes give what one gives, whatever the kind and objective; what fails on one rank fails on all, by name, and alone."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from graft.distributed.group import ALONE, Group
from graft.distributed.shares import Shares
from graft.errors import GraftError
from graft.injection.state import state_of
from tests.training import ranks, test_company
from tests.training.conftest import exact_norm

FEW = ["lora", "prefix", "prompt", "adalora", "dpo", "adamix"]
"""Kinds of every hook, pairs with a reference, two passes of a sample, a penalty, a loss that the adapter adds."""
CLOSE = {"float64": (1e-12, 1e-12), "float32": (1e-6, 1e-5)}
"""Of losses, relative; of parameters, absolute. In float32 two token budgets of one process differ by 3e-6 (AdamW)."""


@pytest.fixture(autouse=True)
def _norms_are_exact(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("transformers.models.llama.modeling_llama.LlamaRMSNorm.forward", exact_norm)


def finished(path: Path, dtype: str, modes: str, names: list[str], *more: str, size: int = 2) -> None:
    """Train on ranks; both end well."""
    ends = ranks.ended(ranks.started(size, str(path), dtype, modes, ",".join(names), *more))
    assert [code for code, _ in ends] == [0] * size, "\n".join(said for _, said in ends)


def assert_same(wanted: Any, given: Any, dtype: str) -> None:
    """Equal parameters and losses, by job."""
    (parameters, losses), (other, others) = wanted, given
    rel, within = CLOSE[dtype]
    assert set(other) == set(parameters)
    for name, own in parameters.items():
        assert others[name] == pytest.approx(losses[name], rel=rel), name
        for key, tensor in own.items():
            assert float((other[name][key] - tensor).abs().max()) <= within, (name, key)


@pytest.mark.parametrize(
    ("names", "dtype"),
    [
        (FEW, "float64"),
        pytest.param(list(test_company.JOBS), "float64", marks=pytest.mark.slow),
        pytest.param(list(test_company.JOBS), "float32", marks=pytest.mark.slow),
    ],
    ids=["few", "all-float64", "all-float32"],
)
def test_two_ranks_give_what_one_gives(
    names: list[str], dtype: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if len(names) == len(FEW):
        monkeypatch.setattr(test_company, "STEPS", 6)
        monkeypatch.setenv("GRAFT_TEST_STEPS", "6")
    wanted = test_company.trained(getattr(torch, dtype), names, tmp_path / "one")
    modes = ("ddp", "spread", "pipeline")
    finished(tmp_path, dtype, ",".join(modes), names)
    for mode in modes:
        assert_same(wanted, ranks.found(tmp_path / mode), dtype)
    if len(names) > len(FEW):
        finished(tmp_path, dtype, "fsdp2", names)
        assert_same(wanted, ranks.found(tmp_path / "fsdp2"), dtype)


@pytest.mark.slow
@pytest.mark.parametrize("at_head", [False, True])
def test_every_kind_trains_in_every_mode_in_bfloat16(
    at_head: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rounding makes losses differ between splits of a step. A base in parts is the same split as ddp, so it is equal to the last bit,
    unless an adapter sits at the head: there all rows take the model's own head in place of its chunks."""
    monkeypatch.setattr(test_company, "STEPS", 6)
    monkeypatch.setenv("GRAFT_TEST_STEPS", "6")
    model, _ = test_company.world(torch.bfloat16, list(test_company.JOBS))
    heads = [
        name
        for name in test_company.JOBS
        if any(each.site.module == "lm_head" for each in state_of(model).adapter(name).installs)
    ]
    assert heads
    names = [*heads, "lora", "series"] if at_head else [name for name in test_company.JOBS if name not in heads]
    _, losses = test_company.trained(torch.bfloat16, names, tmp_path / "one")
    finished(tmp_path, "bfloat16", "spread,ddp,fsdp2", names)
    found = {mode: ranks.found(tmp_path / mode) for mode in ("spread", "ddp", "fsdp2")}
    for mode, (_, own) in found.items():
        for name in names:
            assert own[name] == pytest.approx(losses[name], rel=3e-2), (mode, name)
    (whole, own), (parts, others) = found["ddp"], found["fsdp2"]
    for name in names if not at_head else ():
        assert others[name] == own[name], name
        assert all(torch.equal(parts[name][key], tensor) for key, tensor in whole[name].items()), name


@pytest.mark.slow
def test_a_job_that_fails_on_one_rank_fails_on_both_and_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(test_company, "STEPS", 8)
    monkeypatch.setenv("GRAFT_TEST_STEPS", "8")
    names = ["lora", "series", "ia3", "dora"]
    finished(tmp_path, "float64", "ddp", names, "faulty")
    jobs = json.loads((tmp_path / "ddp" / "status.json").read_text())["jobs"]
    assert [jobs[name]["ended"] for name in names] == ["finished", "failed", "failed", "finished"]
    assert "'series' became infinite or not a number in step 5" in jobs["series"]["error"]
    assert "a pass fails here" in jobs["ia3"]["error"]
    assert (jobs["series"]["step"], jobs["ia3"]["step"]) == (4, 2)
    samples = json.loads((tmp_path / "ddp" / "failed_batch-series" / "samples.json").read_text())["samples"]
    assert 0 < sum(sample["suspect"] for sample in samples) < len(samples)  # those that ran on rank 1
    wanted = test_company.trained(torch.float64, ["lora", "dora"], tmp_path / "one")
    _, losses = ranks.found(tmp_path / "ddp")
    for name in ("lora", "dora"):
        assert losses[name] == pytest.approx(wanted[1][name], rel=1e-12)


def test_rows_are_dealt_by_tokens_and_jobs_with_a_home_go_there() -> None:
    shares = Shares(Group(0, 2), "ddp")
    assert shares.deal([("a", 9), ("a", 7), ("b", 5), ("b", 4)]) == [[0, 3], [1, 2]]
    assert Shares(Group(0, 2), "spread", {"b": 0}).deal([("a", 9), ("a", 7), ("b", 5), ("b", 4)]) == [[1, 2, 3], [0]]
    homes = Shares(Group(0, 3), "spread")
    homes.settle([("a", 5.0), ("b", 1.0), ("c", 1.0), ("d", 1.0)])
    homes.settle([("e", 1.0)])
    assert sorted(list(homes.homes.values()).count(rank) for rank in range(3)) == [1, 2, 2]


def test_a_group_of_one_exchanges_nothing() -> None:
    assert ALONE.gather({"a": 1}) == [{"a": 1}] and ALONE.tell([2]) == [2] and ALONE.any(True, False) == [True, False]
    with pytest.raises(GraftError, match="broken"), ALONE.agreed():
        raise GraftError("broken")


@pytest.mark.skipif(sys.platform != "linux", reason="threads are counted in /proc")
def test_a_group_that_is_over_holds_no_threads() -> None:
    """One that runs while Python exits may abort the process."""
    code = """
import graft.distributed.group
from pathlib import Path
from torch import distributed as dist
dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
import torch.distributed.nn
dist.destroy_process_group()
print([name for thread in Path("/proc/self/task").glob("*/comm") if "gloo" in (name := thread.read_text())])
"""
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120).stdout == "[]\n"

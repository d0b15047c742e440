"""A base in stages, one on each process: every family gives what one process gives, or is refused by name; jobs fail alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from graft.distributed.group import Group
from graft.distributed.pipeline import Stage, even
from graft.distributed.shares import Shares
from graft.errors import GraftError
from graft.injection.holes import Hole
from graft.training.batching import Batcher
from graft.training.passes import Passes
from graft.training.rows import Row
from graft.training.staging import cut_into_stages
from tests.training import ranks, stages, test_company
from tests.training.conftest import attach, exact_norm, job_on, tiny
from tests.training.test_world import finished

FAMILIES = [
    "llama", "gpt2", "gpt_neox", "bloom", "falcon", "falcon_alibi", "gemma2", "gemma3", "phi", "cohere", "granite", "opt", "mpt",
    "mistral", "qwen2", "gptj", "mamba", "qwen3_moe",
]  # fmt: skip


def test_an_even_cut_gives_the_last_ranks_the_smaller_stages() -> None:
    assert (even(8, 2), even(10, 4), even(3, 3)) == ([4, 4], [3, 3, 2, 2], [1, 1, 1])


@pytest.mark.parametrize(("rank", "order"), [(0, "f0 f1 f2 b0 f3 b1 b2 b3"), (1, "f0 f1 b0 f2 b1 f3 b2 b3")])
def test_a_stage_goes_backward_once_the_stages_after_it_are_busy(rank: int, order: str) -> None:
    """1F1B on the first two of three ranks."""
    job, seen = job_on(attach(tiny()), batch_size=4), list[str]()
    passes = Passes(Batcher(1, "padded", 0, Shares(Group(rank, 3), "pipeline")), job.rows())

    def forward(micro: list[Row]) -> int:
        seen.append(f"f{micro[0].position}")
        return micro[0].position

    passes.both_ways(forward, lambda position: seen.append(f"b{position}"))
    assert seen == order.split()


class Loop:
    """Neighbours that note what they are given, and give back a gradient of ones."""

    def __init__(self) -> None:
        self.onward: list[torch.Tensor] = []

    def hand_on(self, hidden: torch.Tensor) -> None:
        self.onward.append(hidden)

    def take_back(self, like: torch.Tensor) -> torch.Tensor:
        return torch.ones_like(like)


def test_backward_from_losses_that_a_stage_cannot_see_is_the_gradient_that_the_next_one_sends() -> None:
    x = torch.arange(6.0).view(1, 2, 3).requires_grad_()
    stage = Stage(Loop(), first=True, last=False)  # type: ignore[arg-type]
    stage.hand_on(2 * x)
    losses = stage.losses(5)
    assert losses.tolist() == [0.0] * 5
    (losses.sum() * float("nan")).backward()
    assert x.grad is not None and x.grad.eq(2).all()


def test_a_base_whose_blocks_hand_on_more_than_hidden_states_is_refused_by_name() -> None:
    model, jobs = stages.world("gemma3n", torch.float32)
    shares = Shares(Group(0, 1), "pipeline")
    with pytest.raises(
        GraftError, match="Gemma3nForCausalLM cannot be cut into the stages of a pipeline: block 0 returns"
    ):
        cut_into_stages(model, jobs, stages.Apart(64, "padded", 0, shares), "auto")
    assert not any(isinstance(module, Hole) for module in model.modules())


def told(families: list[str], size: int) -> dict[str, Any]:
    """What the processes found, by family."""
    ends = ranks.ended(ranks.started(size, "float32", ",".join(families), module="stages"))
    assert [code for code, _ in ends] == [0] * size, "\n".join(said for _, said in ends)
    lines = [json.loads(line) for line in ends[0][1].splitlines() if line.startswith("{")]
    return {line["family"]: line for line in lines}


@pytest.mark.slow
@pytest.mark.parametrize("number", range(3))
def test_every_family_gives_the_numbers_of_one_process_to_the_last_bit(number: int) -> None:
    families = FAMILIES[number::3]
    found = told(families, 2)
    assert set(found) == set(families)
    for family, each in found.items():
        assert "lora" in each["kinds"] and (each["losses"], each["parameters"]) == (0.0, 0.0), family


@pytest.mark.slow
def test_a_stage_between_two_others_takes_and_hands_on() -> None:
    for family, each in told(["deep", "mamba"], 3).items():
        assert (each["losses"], each["parameters"]) == (0.0, 0.0), family


@pytest.mark.slow
def test_a_job_with_a_loss_that_is_not_a_number_goes_out_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("transformers.models.llama.modeling_llama.LlamaRMSNorm.forward", exact_norm)
    monkeypatch.setattr(test_company, "STEPS", 8)
    monkeypatch.setenv("GRAFT_TEST_STEPS", "8")
    names = ["lora", "series", "dora"]
    finished(tmp_path, "float64", "pipeline", names, "faulty")
    jobs = json.loads((tmp_path / "pipeline" / "status.json").read_text())["jobs"]
    assert [jobs[name]["ended"] for name in names] == ["finished", "failed", "finished"]
    assert "'series' became infinite or not a number in step 5" in jobs["series"]["error"]
    wanted = test_company.trained(torch.float64, ["lora", "dora"], tmp_path / "one")
    parameters, losses = ranks.found(tmp_path / "pipeline")
    for name in ("lora", "dora"):
        assert losses[name] == pytest.approx(wanted[1][name], rel=1e-12)
        for key, tensor in wanted[0][name].items():
            assert float((parameters[name][key] - tensor).abs().max()) <= 1e-12, (name, key)

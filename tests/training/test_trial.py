"""The time that `graft check` expects: neither a cold start nor a batch larger than the data may enter it."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
import torch

from graft.config import load_run
from graft.training.check import check
from graft.training.forward.causal import Forward


def test_slow_first_passes_do_not_count_and_a_step_has_no_more_rows_than_the_data(
    world: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own, passes = Forward.losses, 0

    def slow_at_first(self: Forward, *inputs: Any) -> Any:
        nonlocal passes
        if torch.is_grad_enabled():
            passes += 1
            time.sleep(0.6 if passes <= 3 else 0.0)
        return own(self, *inputs)

    monkeypatch.setattr(Forward, "losses", slow_at_first)
    config = load_run(
        {
            "base": {"model": str(world / "base"), "device": "cpu"},
            "adapter": {"kind": "lora", "rank": 2, "sites": "attn.q"},
            "data": {"train": str(world / "data.json"), "template": "alpaca", "cache": False},
            "train": {"steps": 10, "batch_size": 96},
        }
    )
    report = check(config)
    assert passes > 3 and report.trial.seconds >= 0.6 and report.trial.hours * 3600 / 10 < 0.3
    (job,) = report.parts.jobs
    assert len(job.train) == 24 and job.step_tokens == report.trial.tokens == job.train.lengths.sum()


@pytest.mark.parametrize("method", ["full", "qft"])
def test_the_parts_of_the_peak_are_those_of_the_method(world: Path, method: str) -> None:
    """Algebra: in float32, AdamW's gradients and state are once and twice the weights; QFT holds a byte for each, and a little."""
    config = load_run(
        {
            "base": {"model": str(world / "base"), "device": "cpu", "dtype": "float32"},
            "data": {"train": str(world / "data.json"), "template": "alpaca", "cache": False},
            "train": {"steps": 3, "batch_size": 2, "method": method},
        }
    )
    found = check(config)
    (job,), memory = found.parts.jobs, found.trial.memory
    assert memory.adapter == 0 and memory.activations > 0
    if method == "full":
        assert memory.gradients == 4 * job.trainable.count and memory.optimizer == 2 * memory.gradients
        assert memory.weights >= 4 * job.trainable.count
    else:
        assert job.trainable.count < memory.weights < 4 * job.trainable.count
        assert job.trainable.count < memory.optimizer < 2 * job.trainable.count
    assert found.to_dict()["trial"]["memory"]["weights"] == memory.weights

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

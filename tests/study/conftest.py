"""A tiny study on a random base."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.small import save_small


@pytest.fixture
def run_of(tmp_path: Path) -> dict[str, Any]:
    """A run on a tiny LLaMA: rows to learn, and rows to validate on."""
    save_small(tmp_path / "base")
    rows = [{"question": f"{a} and {b}?", "answer": str(a + b)} for a in range(6) for b in range(4)]
    for name, part in (("train", rows[:16]), ("validation", rows[16:20]), ("test", rows[20:])):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
    return {
        "base": {"model": str(tmp_path / "base"), "device": "cpu", "dtype": "float32"},
        "adapter": {"kind": "lora", "rank": 2, "sites": "attn.q"},
        "data": {
            "train": str(tmp_path / "train.jsonl"),
            "validation": str(tmp_path / "validation.jsonl"),
            "template": "plain",
        },
        "train": {"steps": 4, "batch_size": 4, "lr": 1e-2, "validate_every": 2},
        "eval": {"max_new_tokens": 4},
    }

"""A tiny federation on a random base: six clients by topic."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from graft.federation.definition import read_federation
from graft.federation.methods.base import Update
from graft.federation.methods.choosing import method_of
from graft.federation.workplace import Workplace
from tests.small import save_small


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base, rows with topics, and a file for each of three clients."""
    folder = tmp_path_factory.mktemp("federation")
    save_small(folder / "base")
    save_small(folder / "other", vocab_size=258, rope_theta=5000.0, tie_word_embeddings=False, hidden_size=16)
    save_small(folder / "calm", scale=1.0)
    rows = [
        {"question": f"{a} and {b}?", "answer": str(a + b), "topic": "odd" if a % 2 else "even"}
        for a in range(8) for b in range(6)
    ]  # fmt: skip
    write(folder / "rows.jsonl", rows[:40])
    write(folder / "held.jsonl", rows[40:])
    for number, name in enumerate(("ada", "ben", "cleo")):
        write(folder / f"{name}.jsonl", rows[number * 13 : number * 13 + 9 + number])
    return folder


def write(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture
def federation(files: Path) -> dict[str, Any]:
    return tiny(files)


def tiny(files: Path) -> dict[str, Any]:
    """Three clients with a file each, who train everything by FedKSeed."""
    return {
        "base": {"model": str(files / "base"), "device": "cpu", "dtype": "float32"},
        "data": {
            "train": [str(files / f"{name}.jsonl") for name in ("ada", "ben", "cleo")],
            "validation": str(files / "held.jsonl"), "template": "plain", "cache": False,
        },
        "method": {"kind": "fedkseed", "seeds": 64, "epsilon": 1e-3},
        "local": {"steps": 4, "batch_size": 2, "lr": 1e-4},
        "rounds": 2,
    }  # fmt: skip


LORA = {"kind": "lora", "rank": 4, "alpha": 8, "sites": "attn.q mlp.down"}


def method(federation: dict[str, Any], **changes: Any) -> Any:
    return method_of(Workplace(read_federation({**federation, **changes})))


def updates_of(found: Any, state: Any, number: int = 1) -> list[Update]:
    """What all clients send in a round, each with an equal share."""
    names = list(found.place.clients)
    sent = [found.work(found.down(state, number, name), number, name) for name in names]
    return [Update(name, 1 / len(names), *each, number) for name, each in zip(names, sent, strict=True)]

"""DDP and FSDP2 on two gloo processes train the same adapter as one process does."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import graft
from tests.callers import distributed
from tests.callers.tiny import rows


def launch(*args: str) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {
        **os.environ,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "WORLD_SIZE": "2",
        "OMP_NUM_THREADS": "1",
    }
    script = str(Path(__file__).with_name("distributed.py"))
    workers = [
        subprocess.Popen(
            [sys.executable, script, *args], env=environment | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
        )
        for rank in range(2)
    ]
    assert [worker.wait(timeout=300) for worker in workers] == [0, 0]


SLOW = [("fsdp2", "a"), ("ddp", "p"), ("fsdp2", "b")]


@pytest.mark.parametrize(
    ("mode", "adapter"),
    [("ddp", "a"), ("fsdp2", "p"), *(pytest.param(*each, marks=pytest.mark.slow) for each in SLOW)],
)
def test_two_processes_train_the_same_adapter_as_one(tmp_path: Path, mode: str, adapter: str) -> None:
    launch(mode, adapter, str(tmp_path / "out.pt"))
    model = distributed.build()
    graft.set_active(model, adapter)
    ids = torch.tensor([row["input_ids"] for row in rows(4)])
    distributed.train(model, ids, "one")
    alone = distributed.result(model, adapter)
    found = torch.load(tmp_path / "out.pt", weights_only=True)
    assert set(found) == set(alone)
    for name, tensor in alone.items():
        torch.testing.assert_close(found[name], tensor, atol=1e-5, rtol=0)

"""A hundred clients take the memory of one base and of what the method keeps, not of a base for each."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import ROOT


def measured(shared: Path, clients: int, *options: str) -> dict[str, Any]:
    """The benchmark's run of so many clients, in a process of its own."""
    script = ROOT / "benchmarks" / "federation.py"
    line = [sys.executable, script, "--worker", str(clients), "--shared", shared, "--many-steps", "1", *options]
    answer = subprocess.run(line, capture_output=True, text=True, timeout=900, check=True)
    return json.loads(answer.stdout.splitlines()[-1])


@pytest.mark.slow
@pytest.mark.parametrize("method", ["fedkseed", "ferret", "fedzo", "fedavg, differences"])
def test_memory_does_not_grow_with_the_clients(shared: Path, method: str) -> None:
    few, many = (measured(shared, clients, "--rounds", "2", "--many-method", method) for clients in (10, 100))
    assert (few["clients"], many["clients"]) == (10, 100) and not many["left_out"]
    print(method, few["peak_mib"], many["peak_mib"], few["processor"], many["processor"])
    assert many["peak_mib"] - few["peak_mib"] < 30  # 90 copies of the base would be 90 MiB


@pytest.mark.slow
def test_twenty_rounds_of_a_hundred_clients_take_minutes(shared: Path) -> None:
    found = measured(shared, 100, "--rounds", "20")
    print(found)
    assert found["clients"] == 100 and found["processor"] < 15 * 60

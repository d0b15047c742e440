"""`graft --help` answers at once: nothing heavy is imported, and the whole command takes under half a second."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

HEAVY = ("torch", "transformers", "datasets", "tokenizers", "safetensors", "numpy", "ruamel")


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], ["show", "--help"], ["init", "-h"]])
def test_help_imports_nothing_heavy(arguments: list[str]) -> None:
    code = (
        "import sys\nfrom graft.cli import main\n"
        f"try: main({arguments!r})\nexcept SystemExit as end: assert not end.code\n"
        f"print('imported', [name for name in {HEAVY} if name in sys.modules], file=sys.stderr)"
    )
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert answer.stderr.strip() == "imported []", answer.stderr


def test_help_takes_under_half_a_second_of_one_core() -> None:
    def seconds() -> float:  # of processor time, which a busy machine does not stretch as it does the clock
        before = os.times()
        subprocess.run([sys.executable, "-m", "graft", "--help"], capture_output=True, check=True)
        after = os.times()
        return after.children_user + after.children_system - before.children_user - before.children_system

    assert min(seconds() for _ in range(3)) < 0.5

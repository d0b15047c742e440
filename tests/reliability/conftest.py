"""The unbroken runs that all campaigns compare with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.reliability.processes import Child
from tests.reliability.runs import taken, write_run


class Unbroken:
    """A folder with a run that nobody disturbed, with and without commands: what it left, and its number of file operations."""

    def __init__(self, folder: Path) -> None:
        self.folder = write_run(folder)
        self.truth: dict[bool, dict[str, Any]] = {}
        self.operations: dict[bool, int] = {}

    def of(self, commands: bool) -> dict[str, Any]:
        if commands not in self.truth:
            run = self.folder / f"truth-{commands}"
            how = {"orders": str(run)} if commands else {}
            child = Child(["train", "run.yaml", "--out", run.name], self.folder, watch=str(run), **how)
            assert child.end() == 0, child.said
            self.truth[commands], self.operations[commands] = taken(run), child.out.count("operation")
        return self.truth[commands]


@pytest.fixture(scope="session")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> Unbroken:
    return Unbroken(tmp_path_factory.mktemp("reliability"))

"""Send metrics to the trackers that people already use, through one small protocol. metrics.jsonl is always written too."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from graft.errors import require


class Tracker(Protocol):
    """Receives the numbers of a run."""

    def log(self, step: int, numbers: Mapping[str, float]) -> None:
        """Take numbers by name at a step of the run."""
        ...

    def close(self) -> None:
        """Finish at the end of the run."""
        ...


class TensorBoard:
    """Writes event files in the run folder."""

    def __init__(self, folder: Path, config: Mapping[str, Any]) -> None:
        require("tensorboard", "track")
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(str(folder / "tensorboard"))
        self.writer.add_text("config", f"```\n{config}\n```")

    def log(self, step: int, numbers: Mapping[str, float]) -> None:
        for name, number in numbers.items():
            self.writer.add_scalar(name, number, step)

    def close(self) -> None:
        self.writer.close()


class Module:
    """Logs to wandb, or to trackio, which has the same three functions."""

    def __init__(self, module: str, folder: Path, config: Mapping[str, Any]) -> None:
        self.module = require(module, "track")
        options = {"dir": str(folder)} if module == "wandb" else {}
        self.module.init(project="graft", name=folder.name, config=dict(config), **options)

    def log(self, step: int, numbers: Mapping[str, float]) -> None:
        self.module.log(dict(numbers), step=step)

    def close(self) -> None:
        self.module.finish()


def trackers(names: Sequence[str], folder: Path, config: Mapping[str, Any]) -> list[Tracker]:
    """Make the trackers of these names. Raises `MissingExtra` with the install command for one that is not installed."""
    return [TensorBoard(folder, config) if name == "tensorboard" else Module(name, folder, config) for name in names]


def check_installed(names: Sequence[str]) -> None:
    """Check before a run that the packages of these trackers are installed. Raises `MissingExtra` for one that is not."""
    for name in names:
        require(name, "track")

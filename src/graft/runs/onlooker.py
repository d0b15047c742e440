"""The run folder as the other processes of a run see it: they read what is there, and write nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from graft.runs.folder import RunFolder
from graft.utils.jsonl import JsonLines

if TYPE_CHECKING:
    from graft.config import AnyRun


class SilentLines(JsonLines):
    """Lines that are read and not written."""

    def append(self, *records: Mapping[str, Any]) -> None:
        """Write nothing."""

    def keep(self, wanted: Callable[[dict[str, Any]], bool]) -> None:
        """Change nothing."""


class Onlooker(RunFolder):
    """A run folder that another process writes."""

    def __init__(self, path: str | Path) -> None:
        super().__init__(path)
        self.metrics, self.events, self.samples = (
            SilentLines(each.path) for each in (self.metrics, self.events, self.samples)
        )

    def claim(self, force: bool = False) -> AbstractContextManager[None]:
        """The writer has the claim."""
        return nullcontext()

    def check_vacant(self, overwrite: bool = False) -> None:
        """The writer checks."""

    def create(self, overwrite: bool = False) -> RunFolder:
        """The writer makes the folders."""
        return self

    @contextmanager
    def beginning(self) -> Iterator[None]:
        """The writer writes what makes the folder a run's."""
        yield

    def write_config(self, config: AnyRun) -> None:
        """Write nothing."""

    def rewrite_config(self, config: AnyRun) -> None:
        """Write nothing."""

    def status(self, record: Mapping[str, Any]) -> None:
        """Write nothing."""

    def lock(self, **facts: Any) -> None:
        """Write nothing."""

"""What the pages show, read from the folders of runs and studies."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from graft.errors import GraftError, MissingExtra
from graft.evaluation.tables import Table, group_tables, saved_results
from graft.runs.curves import loss_curves
from graft.runs.folder import RunFolder, find_runs
from graft.runs.summary import summary
from graft.study.folder import STUDY
from graft.study.report.drawing import lines
from graft.utils.files import stamps

MOST_POINTS = 400
"""Points of a curve that are drawn; of more, every so many-th."""
DAMAGED = (GraftError, OSError, UnicodeDecodeError)


class Shelf:
    """The folder of runs and studies that the pages show."""

    def __init__(self, root: Path) -> None:
        """Raises `GraftError` if there is no such folder."""
        if not root.is_dir():
            raise GraftError(f"there is no folder {root} to show")
        self.root = root.resolve()

    def inside(self, name: str) -> Path:
        """Return the folder of this name. Raises `GraftError` for one that is not there, or not inside."""
        try:
            path = (self.root / name).resolve()
            if path.is_relative_to(self.root) and path.is_dir():
                return path
        except (OSError, ValueError):  # no name that a file can have
            pass
        raise GraftError(f"there is no folder {name} here")

    def run(self, name: str) -> RunFolder:
        """Return a run. Raises `GraftError` for a folder that holds none."""
        return RunFolder(self.inside(name)).existing()

    def name_of(self, path: Path) -> str:
        """Return the name of a folder, as it stands in addresses."""
        return path.resolve().relative_to(self.root).as_posix()

    def runs(self) -> list[dict[str, Any]]:
        """Return a line for each run, the newest first; a damaged one says what is wrong with it."""
        found = [self._line(run.path) for run in find_runs(self.root) if run.path.resolve().is_relative_to(self.root)]
        return sorted(found, key=lambda line: line["updated"], reverse=True)

    def _line(self, path: Path) -> dict[str, Any]:
        line: dict[str, Any] = {"name": self.name_of(path), "state": "damaged", "updated": "", "error": None}
        line["evaluated"] = False
        try:
            found = summary(path)
        except DAMAGED as error:
            return {**line, "error": str(error)}
        status, last = found["status"], found["last_metrics"]
        return {
            **line,
            "state": status.get("state", "not started"),
            "base": found["base"],
            "adapter": found["adapter"],
            "step": status.get("step", last.get("step")),
            "loss": last.get("loss"),
            "updated": str(status.get("updated", ""))[:16].replace("T", " "),
            "error": status.get("error"),
            "evaluated": bool(found["evaluations"]),
        }

    def studies(self) -> list[str]:
        """Return the names of the studies."""
        found = sorted(path.parent for depth in ("", "*/", "*/*/") for path in self.root.glob(f"{depth}{STUDY}"))
        return [self.name_of(path) for path in found]

    def report(self, name: str) -> str | None:
        """Return the report of a study as HTML, None if it is not there yet. Raises `GraftError` for a folder that holds no study."""
        folder = self.inside(name)
        if not (folder / STUDY).is_file():
            raise GraftError(f"{name} is not the folder of a study")
        path = folder / "report.html"
        return path.read_text(encoding="utf-8") if path.is_file() else None


def signature(folder: Path) -> tuple[Any, ...]:
    """Return what changes when a run writes: sizes and times of its files that the pages show."""
    names = ("status.json", "metrics.jsonl", "samples.jsonl")
    return stamps(folder / name for name in names)


def state_of_run(run: RunFolder) -> dict[str, Any]:
    """Return what the live part of a run's page shows."""
    found, curves = summary(run.path), loss_curves(run.metrics.read())
    status = found["status"]
    facts = {"base": found["base"], "adapter": found["adapter"], "state": status.get("state", "not started"),
             "step": status.get("step"), "updated": str(status.get("updated", ""))[:19].replace("T", " "),
             "error": status.get("error"), "checkpoints": len(found["checkpoints"]), "adapters": ", ".join(found["adapters"])}  # fmt: skip
    last = {
        key: value
        for key, value in found["last_metrics"].items()
        if isinstance(value, int | float | str) and key != "job"
    }
    facts = {key: value for key, value in facts.items() if value not in (None, "")}
    return {"facts": facts, "last": last, "jobs": status.get("jobs", {}), **drawn(curves)}


def drawn(curves: Mapping[str, Any]) -> dict[str, Any]:
    """Return the curves as SVG, or why there are none."""
    points = {name: own[:: max(1, len(own) // MOST_POINTS)] for name, own in curves.items()}
    if not points:
        return {"svg": None, "no_curve": "No losses yet."}
    try:
        return {"svg": lines(points, "step", "loss per supervised token"), "no_curve": None}
    except MissingExtra as error:
        return {"svg": None, "no_curve": str(error)}


def samples_of(run: RunFolder) -> list[dict[str, Any]]:
    """Return the samples of a run in pieces (text, read or learnt). Runs of earlier versions lack the pieces."""
    found = []
    for line in run.samples.read():
        learnt, text = str(line.get("trained_on", "")), str(line.get("text", ""))
        at = text.rfind(learnt) if learnt else -1
        whole = (
            [(text, "read")]
            if at < 0
            else [(text[:at], "read"), (learnt, "learnt"), (text[at + len(learnt) :], "read")]
        )
        found.append({**line, "pieces": line.get("pieces") or whole})
    return found


def results_of(run: RunFolder) -> list[Table]:
    """Return the tables of a run's evaluations; each has its scores with their 95 % intervals."""
    return group_tables(saved_results(run.path / "eval")) if (run.path / "eval").is_dir() else []

"""Write the report of a study into its folder, in three forms."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from graft.study.definition import Study
from graft.study.report.data import report_of
from graft.study.report.figures import figures
from graft.study.report.markdown import markdown
from graft.study.report.page import page
from graft.study.store import Store
from graft.utils.files import write_json_atomic, write_text_atomic


def write_reports(study: Study, store: Store, out: Path) -> dict[str, Any]:
    """Write report.html, report.md and report.json as far as the study has run, and return the report.

    Raises `MissingExtra` without matplotlib.
    """
    report = report_of(study, store, out)
    counts = report["counts"]
    running = bool(counts.get("waiting") or counts.get("running"))
    write_text_atomic(out / "report.html", page(report, figures(report), running))
    write_text_atomic(out / "report.md", markdown(report))
    write_json_atomic(out / "report.json", report)
    return report

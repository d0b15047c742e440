"""The warnings in a data report: what its reader should know besides the numbers."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress

from graft.data.labelling import Labelling
from graft.data.report import DataReport
from graft.data.template import Template
from graft.errors import counted, listed


def data_warnings(report: DataReport, template: Template | Labelling) -> list[str]:
    """Return the warnings about the numbers in a report, one sentence each."""
    warnings = [f"Nothing reads {listed(columns)} of {source}." for source, columns in report.unread]
    if report.duplicates:
        warnings.append(f"{_rows(report.duplicates, 'training sample', 'repeats', 'repeat')} an earlier one.")
    if report.shared:
        warnings.append(f"{_rows(report.shared, 'validation sample', 'is', 'are')} in the training data too.")
    if report.train.empty or report.train.unanswered:
        missing = "text" if isinstance(template, Labelling) else "answer"
        warnings.append(
            f"{_rows(report.train.empty + report.train.unanswered, 'training row', 'has', 'have')} no {missing}: left out."
        )
    warnings += _equal_numbers([label for label, _, _ in report.labels])
    if report.train.masked:
        warnings.append(
            f"{_rows(report.train.masked, 'training row', 'says', 'say')} not to train on any answer: left out."
        )
    if report.marked:
        good, bad = report.marked
        warnings.append(
            f"{good:,} answers are marked good and {bad:,} bad." + ("" if good and bad else " KTO needs both.")
        )
    if report.train.same:
        warnings.append(f"{_rows(report.train.same, 'training pair', 'has', 'have')} two equal answers: left out.")
    return warnings


def _equal_numbers(labels: Sequence[str]) -> list[str]:
    """Return a warning for each number that the data write in several ways, so that it is several classes."""
    written: dict[float, list[str]] = {}
    for label in labels:
        with suppress(ValueError):
            written.setdefault(float(label), []).append(label)
    return [
        f"{' and '.join(map(repr, same))} are one number and {len(same)} classes: write them alike if they are one class."
        for same in written.values()
        if len(same) > 1
    ]


def _rows(number: int, noun: str, one: str, many: str) -> str:
    """A number of rows with its verb: "1 training row has"."""
    return f"{counted(number, noun)} {one if number == 1 else many}"

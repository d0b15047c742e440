"""Refuse data of which too much would be left out."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from graft.config.data import DataConfig, SourceConfig
from graft.data.report import DataReport
from graft.data.samples import Example, Rejected, Sample
from graft.errors import GraftError


def check_lengths(
    config: DataConfig,
    parts: Sequence[tuple[Sequence[Sample], Sequence[Example | Rejected]]],
    room: Callable[[], int | None],
) -> None:
    """Raise `GraftError` for overlong samples if `overlong` is error. The message offers the ways out that the base allows.

    room: returns how many tokens the base holds, None if there is no limit.
    """
    if config.overlong != "error":
        return
    pairs = [pair for samples, found in parts for pair in zip(samples, found, strict=True)]
    long = [(one.length, sample) for sample, one in pairs if isinstance(one, Rejected) and one.reason == "overlong"]
    if not long:
        return
    longest, sample = max(long, key=lambda pair: pair[0])
    documents = config.task == "causal" and all(len(one.messages) == 1 for _, one in long)
    most, rounded = room(), -(-longest // 8) * 8
    if most is None or longest <= most:
        wanted, length = "Choose one", ""
        whole = f"  data.max_length={min(rounded, most or rounded):<13} keeps every sample whole\n"
    else:
        wanted, whole = f"The base has room for {most:,}, so not every sample can stay whole. Choose one", ""
        length = f" data.max_length={most}" if most != config.max_length else ""
    raise GraftError(
        f"{len(long):,} of {len(pairs):,} samples are longer than data.max_length={config.max_length} tokens; the longest "
        f"has {longest:,} ({sample.where}). {wanted}:\n{whole}"
        f"  data.overlong=drop{length}            leaves these samples out\n"
        f"  data.overlong=truncate_prompt{length} shortens their questions, never an answer"
        + (f"\n  data.overlong=split{length}           cuts documents into pieces" if documents else "")
    )


def check_counts(report: DataReport, sources: Sequence[SourceConfig], examples: Sequence[Sequence[Example]]) -> None:
    """Raise `GraftError` if nothing is left to train or to validate on, or if a source's weight gives it no sample per epoch."""
    for counts in (report.train, *([report.validation] if report.validation else [])):
        if not counts.targets:
            raise GraftError(
                f"{counts.name}: no token is left to train on. Of {counts.rows:,} rows, {counts.dropped:,} are longer than "
                f"data.max_length={report.max_length}, {counts.empty:,} have an empty answer, {counts.unanswered:,} no answer"
                + (f", {counts.masked:,} say not to train on any" if counts.masked else "")
                + (f", {counts.same:,} have two equal answers" if report.pairs else "")
            )
    for source, kept in zip(sources, examples, strict=True):
        if kept and round(source.weight * len(kept)) < 1:
            raise GraftError(
                f"{source.path}: with weight {source.weight}, {len(kept)} samples give less than one per epoch: raise the weight"
            )

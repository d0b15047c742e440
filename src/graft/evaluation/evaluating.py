"""From a run folder (or a base with adapters) and a data file to a result: what `graft eval` and `Run.eval` call."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from graft.config.schema import EvalConfig, SourceConfig
from graft.data.opening import rows_of
from graft.data.preparing import samples_of, validation_source
from graft.data.reading import local_files, read
from graft.data.samples import Sample
from graft.errors import GraftError
from graft.evaluation.contestants import Bench, assemble
from graft.evaluation.datafile import Progress, evaluate_bench, evaluation_of, protocol_hash
from graft.runs import RunFolder

WORKED = ("output", "completion", "response")
"""Columns that hold a worked answer where `answer` holds its result, as in the files of LLM-Adapters."""


def evaluate(run: RunFolder | str | Path, data: str | Path | None = None, **options: Any) -> dict[str, Any]:
    """Loss and accuracy of a run's base and adapters on a data file, or on the run's own validation data.

    Written to eval/<task>.<protocol hash>/ in the run folder; the return value is what result.json holds. options: as
    `evaluate_on` takes them.
    """
    folder = (run if isinstance(run, RunFolder) else RunFolder(run)).existing()
    return evaluate_on(assemble(folder), data, folder.path / "eval", **options)


def evaluate_on(
    bench: Bench,
    data: str | Path | SourceConfig | None,
    out: Path | None,
    *,
    settings: EvalConfig | None = None,
    beams: int = 1,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Evaluate a bench on a data file and keep the result in a folder of its own below `out` (None: nowhere)."""
    config = bench.config
    settings = settings or (config.eval if config is not None else EvalConfig())
    task, samples, golds = _rows(bench, data, settings.limit)
    train_on = config.data.train_on if config is not None else "completion"
    evaluation = evaluation_of(task, samples, settings, golds, train_on=train_on, beams=beams)
    folder = out / f"{task}.{protocol_hash(evaluation, bench.contestants)}" if out is not None else None
    result = evaluate_bench(bench, evaluation, folder, progress)
    return {**result, "folder": None if folder is None else str(folder)}


def _rows(
    bench: Bench, data: str | Path | SourceConfig | None, limit: int | None
) -> tuple[str, list[Sample], list[str] | None]:
    """The task's name, its rows, and the right answers where the file has them apart."""
    config = bench.config
    if data is not None:
        source = data if isinstance(data, SourceConfig) else SourceConfig(path=str(data), limit=limit)
    elif config is None:
        raise GraftError("name the data to evaluate on: --data FILE")
    else:
        source = validation_source(config.data)
    if source is not None:
        samples = read(source)
        return Path(source.path).stem, samples, _golds(source, samples)
    assert config is not None
    _, held_out = samples_of(config.data)
    if not held_out:
        raise GraftError("this run has no validation data: name the data to evaluate on with --data FILE")
    return "validation", held_out, None


def _golds(source: SourceConfig, samples: Sequence[Sample]) -> list[str] | None:
    """The column `answer` of files that have one beside a worked answer (`output`, `completion`, `response`); else None."""
    files = local_files(source)
    tables = {str(file): rows_of(file) for file in files} if files is not None else {}
    rows = [tables[sample.source][sample.row - 1] for sample in samples if sample.source in tables]
    if not rows or not any("answer" in row and any(name in row for name in WORKED) for row in rows):
        return None
    for sample, row in zip(samples, rows, strict=True):
        if row.get("answer") is None:
            raise GraftError(f"{sample.where}, field 'answer': is missing, though other rows have it")
    return [str(row["answer"]) for row in rows]

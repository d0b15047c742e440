"""From a run folder (or a base with adapters) and a data file to a result: what `graft eval` and `Run.eval` call."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from graft.config.schema import EvalConfig, SourceConfig
from graft.data.preparing import samples_of, validation_source
from graft.data.reading import read
from graft.data.samples import Sample
from graft.errors import GraftError
from graft.evaluation.contestants import Bench, assemble
from graft.evaluation.datafile import Progress, evaluate_bench, evaluation_of, protocol_hash
from graft.runs import RunFolder


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
    task, samples = _rows(bench, data, settings.limit)
    train_on = config.data.train_on if config is not None else "completion"
    evaluation = evaluation_of(task, samples, settings, train_on=train_on, beams=beams)
    folder = out / f"{task}.{protocol_hash(evaluation, bench.contestants)}" if out is not None else None
    result = evaluate_bench(bench, evaluation, folder, progress)
    return {**result, "folder": None if folder is None else str(folder)}


def _rows(bench: Bench, data: str | Path | SourceConfig | None, limit: int | None) -> tuple[str, list[Sample]]:
    """The task's name and its rows."""
    if data is not None:
        source = data if isinstance(data, SourceConfig) else SourceConfig(path=str(data), limit=limit)
        return Path(source.path).stem, read(source)
    config = bench.config
    if config is None:
        raise GraftError("name the data to evaluate on: --data FILE")
    source = validation_source(config.data)
    if source is not None:
        return Path(source.path).stem, read(source)
    _, held_out = samples_of(config.data)
    if not held_out:
        raise GraftError("this run has no validation data: name the data to evaluate on with --data FILE")
    return "validation", held_out

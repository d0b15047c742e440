"""What the files of a run say, in one mapping."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from graft.config.document import read_document
from graft.errors import GraftError
from graft.runs.folder import RunFolder


def summary(folder: Path) -> dict[str, Any]:
    """Collect what the files of one run say, without importing anything heavy."""
    run = RunFolder(folder)
    config, metrics = read_document(run.config_path).data, run.metrics.read()
    adapter, jobs = config.get("adapter"), config.get("jobs")
    last: dict[str, Any] = {}
    by_job: dict[Any, dict[str, Any]] = {}
    for record in metrics:
        if not isinstance(record, dict):
            raise GraftError(f"{run.metrics.path} holds a line that is not a JSON object: {record!r}")
        last = by_job.setdefault(record.get("job"), {})  # the numbers of two jobs are never mixed
        last.update(record)
    return {
        "run": str(folder),
        "base": base.get("model") if isinstance(base := config.get("base"), dict) else base,
        "adapter": f"{len(jobs)} jobs"
        if jobs
        else adapter.get("kind") or adapter.get("preset")
        if isinstance(adapter, dict)
        else adapter or _method(config),
        "status": run.read_status(),
        "last_metrics": last,
        "adapters": run.adapters(),
        "checkpoints": run.checkpoints(),
        "evaluations": sorted(path.parent.name for path in (folder / "eval").glob("*/result.json")),
    }


def _method(config: dict[str, Any]) -> Any:
    """The method of a run without an adapter, which trained the base."""
    train = config.get("train")
    method = train.get("method") if isinstance(train, dict) else None
    return method.get("kind") if isinstance(method, dict) else method

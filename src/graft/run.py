"""A run as a Python object: the same steps and the same configuration as on the command line.

run = graft.Run.load("run.yaml", "adapter.rank=32")
run.check(); run.train(out="runs/math"); run.eval("test.jsonl")
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from graft.errors import GraftError
from graft.runs.folder import RunFolder

if TYPE_CHECKING:
    from graft.config import AnyRun


class Run:
    """One run: its configuration, and its run folder once it has been trained (or if it was loaded from its folder)."""

    def __init__(self, config: AnyRun, out: str | Path, folder: RunFolder | None = None) -> None:
        self.config = config
        self.out = Path(out)
        self.folder = folder

    def __repr__(self) -> str:
        return f"Run(out={str(self.out)!r}, trained={self.folder is not None})"

    @classmethod
    def load(cls, source: str | Path | Mapping[str, Any], *changes: str) -> Run:
        """Load a run from a YAML file, a run folder or a mapping, with `key.sub=value` changes on top.

        A run from run.yaml is written to runs/run, unless `train` gets another folder. Raises a `GraftError` that lists all
        mistakes with file, line and, for a wrong key, the nearest right one.
        """
        from graft.config import load_run

        if isinstance(source, Mapping):
            return cls(load_run(source, changes), Path("runs") / "run")
        path = Path(source)
        if not path.is_dir():
            return cls(load_run(path, changes), Path("runs") / path.stem)
        folder = RunFolder(path).existing()
        return cls(folder.configured(changes), path, folder)

    def check(self) -> Any:
        """Check everything that can go wrong before it costs an hour: data, template, sites, and one measured step.

        Returns a report; for a run of several jobs, a mapping from their names to their reports.
        """
        from graft.evaluation.settings import refuse_unusable
        from graft.training import check_each

        refuse_unusable(self.config)
        found = check_each(self.config)
        return found if len(found) > 1 else next(iter(found.values()))

    def train(self, out: str | Path | None = None, *, overwrite: bool = False) -> RunFolder:
        """Train and return the run folder. A folder that already holds a run is refused, or emptied if `overwrite`."""
        from graft.evaluation.settings import refuse_names
        from graft.evaluation.while_training import judge
        from graft.training import train

        refuse_names(self.config)
        self.out = Path(out) if out is not None else self.out
        self.folder = train(self.config, self.out, overwrite=overwrite, judge=judge)
        return self.folder

    def resume(self) -> RunFolder:
        """Continue the run from the last checkpoint in its folder."""
        folder = self._trained()
        from graft.evaluation.while_training import judge
        from graft.training import resume

        self.folder = resume(folder, judge=judge)
        return self.folder

    def eval(
        self,
        what: str | Path | Sequence[str] | None = None,
        *,
        data: str | Path | None = None,
        protocol: str | None = None,
    ) -> dict[str, Any]:
        """Evaluate base and adapters on a data file, on benchmarks (a list of names), or (None) on what the run's block `eval` names.

        data: the folder with the benchmarks' files; default: the run's `eval.data`.
        protocol: how benchmarks are asked and judged; default: the run's `eval.protocol`.
        Without a file and without benchmarks, the run's own validation data give loss and accuracy.
        """
        folder = self._trained()
        from graft.evaluation import evaluate

        settings = folder.eval_settings(self.config.each())
        tasks = None if isinstance(what, str | Path) else [*what] if what is not None else settings.tasks
        if not tasks:
            return evaluate(folder, what if isinstance(what, str | Path) else None)
        from graft.evaluation import evaluate_tasks
        from graft.generation.loaded import load_candidates

        where = folder.path / "eval"
        return evaluate_tasks(
            load_candidates(folder),
            tasks,
            protocol or settings.protocol,
            data or settings.data,
            where,
            settings=settings,
        )

    def _trained(self) -> RunFolder:
        if self.folder is None:
            raise GraftError(
                f"this run has not been trained yet: call train() first, or load its folder with Run.load('{self.out}')"
            )
        return self.folder

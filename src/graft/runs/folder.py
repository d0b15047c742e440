"""The run folder: everything that a run writes. Its files are the only source for every reader.

    config.yaml   lock.json   status.json   metrics.jsonl   events.jsonl   samples.jsonl   .lock (claim.py)
    adapters/<name>/   model/   checkpoints/<step>/   eval/<task>.<protocol-hash>/   jobs/ (commands.py)   aside/ (offloaded jobs)

The names are in contents.py. Files are replaced as a whole or appended line by line, so that a run that is killed at any moment leaves a
readable folder.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from copy import deepcopy
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from graft.errors import GraftError
from graft.runs.claim import claim, file_system, is_alive, is_claimed
from graft.runs.contents import FOLDERS, delete_run, is_run, is_vacant, may_be_run
from graft.runs.surroundings import surroundings
from graft.utils.files import explain_write_errors, recover_dir, write_json_atomic
from graft.utils.jsonl import JsonLines, read_json

if TYPE_CHECKING:
    from graft.config import AnyRun, EvalConfig, RunConfig

OTHERS = {
    "federation.sqlite": "it holds a federation, which goes on with graft federate FILE --out FOLDER --resume; what it trained is used by "
    "--base BASE --adapter FOLDER/adapters/federated, or by --base FOLDER/model where the base trained",
    "study.sqlite": "it holds a study, which goes on with graft study FILE --out FOLDER --resume; its trials are runs under packs/",
}
"""What a folder may hold instead of a run, by the file that shows it."""


class RunFolder:
    """The folder of one run. Constructing the object touches no file; `claim` makes the folder, and `create` makes it a run's.

    metrics, events and samples are `JsonLines`: `append(record)`, `read()`, `keep(predicate)`.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.metrics = JsonLines(self.path / "metrics.jsonl")
        self.events = JsonLines(self.path / "events.jsonl")
        self.samples = JsonLines(self.path / "samples.jsonl")

    def __repr__(self) -> str:
        return f"RunFolder({str(self.path)!r})"

    @property
    def config_path(self) -> Path:
        """config.yaml, the resolved configuration of the run."""
        return self.path / "config.yaml"

    @property
    def config(self) -> AnyRun:
        """The run's configuration. Its paths lead, from any working directory, to the files that they named where the run was started.

        Raises `GraftError` if this is not a run folder.
        """
        return self.configured()

    def configured(self, changes: Sequence[str] = ()) -> Any:
        """Return the run's configuration with `key.sub=value` changes on top, whose paths are relative to the working directory."""
        from graft.config import load_run

        return load_run(self.existing().config_path, changes, self.started_in())

    def started_in(self) -> list[Path]:
        """Return the folder where the run was started: as seen from the run folder, which may have moved with it, and as it was then."""
        return [self.path / folder for folder in self.facts().get("started_in", ())]

    def missing(self, config: AnyRun) -> list[str]:
        """Return the paths of the run's configuration that led to files when the run began and lead to nothing now."""
        from graft.config import lost_paths

        return lost_paths(config.model_dump(mode="json"), self.facts().get("paths", ()))

    def facts(self) -> dict[str, Any]:
        """Return the content of lock.json; empty if there is none."""
        path = self.path / "lock.json"
        return read_json(path) if path.exists() else {}

    def jobs(self) -> dict[str, RunConfig]:
        """Return the jobs of the run by name, including those submitted while it trained. Each is the run that it would be alone."""
        from graft.config import resolve_job
        from graft.runs.commands import CommandQueue

        config = self.config
        submitted = [command for command in CommandQueue(self.path).journal.read() if command["do"] == "submit"]
        own = {command["job"]: resolve_job(config, self.located(command["config"])) for command in submitted}
        return {**own, **config.each()}

    def located(self, job: Mapping[str, Any]) -> dict[str, Any]:
        """Return the settings of a submitted job with paths that lead to its files from the working directory."""
        from graft.config import relocate

        copied = deepcopy(dict(job))
        relocate(copied, self.started_in())
        return copied

    def eval_settings(self, jobs: Mapping[str, RunConfig] | None = None) -> EvalConfig:
        """Return the block `eval` that all jobs share. Raises `GraftError` if their blocks differ.

        jobs: the jobs, if their settings have been changed (default: as they are in the folder).
        """
        own = {name: job.eval for name, job in (self.jobs() if jobs is None else jobs).items()}
        first = next(iter(own.values()))
        differing = [name for name, settings in own.items() if settings != first]
        if differing:
            raise GraftError(
                f"the jobs of {self.path} differ in their settings under eval ({', '.join(differing)}): evaluate them one at a "
                f"time with --base and --adapter {self.path}/adapters/NAME"
            )
        return first

    def existing(self) -> RunFolder:
        """Return this folder if it holds a run. Raises `GraftError`, saying what is there, if it does not."""
        if not self.config_path.is_file():
            raise GraftError(f"{self.path} is not a run folder: {self._found()}")
        return self

    def _found(self) -> str:
        """What is there instead of a run."""
        if not self.path.is_dir():
            return "it is a file" if self.path.exists() else "there is no such folder"
        other = next((said for file, said in OTHERS.items() if (self.path / file).is_file()), None)
        return other or "it holds no config.yaml"

    def claim(self, force: bool = False) -> AbstractContextManager[None]:
        """Let nobody else train in this folder during a block of code (`graft.runs.claim`). force: for where locks say nothing."""
        return claim(self.path, self.last_status(), force)

    def check_vacant(self, overwrite: bool = False) -> None:
        """Raise `GraftError`, and touch nothing, unless a new run may begin here: in an empty folder or, with `overwrite`, in a run's."""
        if os.path.lexists(self.path) and not self.path.is_dir():
            raise GraftError(f"{self.path} is a file: name a folder for the run")
        with explain_write_errors(self.path):
            if is_vacant(self.path):
                return
        if not is_run(self.path):
            raise GraftError(f"{self.path} holds files that are not a run: name a new or empty folder")
        if not overwrite:
            raise GraftError(
                f"{self.path} already holds a run: continue it with 'graft resume {self.path}', replace it with "
                "--overwrite, or name another folder"
            )

    def create(self, overwrite: bool = False) -> RunFolder:
        """Make the folders of a new run. With `overwrite`, the files of a run that is there are deleted, and nothing else."""
        self.check_vacant(overwrite)
        with explain_write_errors(self.path):
            delete_run(self.path)
            for folder in FOLDERS:
                (self.path / folder).mkdir(parents=True, exist_ok=True)
        return self

    @contextmanager
    def beginning(self) -> Iterator[None]:
        """Write what makes the folder a run's in a block of code; if that fails (a full disk), the folder is vacant again."""
        try:
            yield
        except BaseException:
            if not self.config_path.exists() and is_vacant(self.path):
                with suppress(OSError):  # the error itself matters more
                    delete_run(self.path)
            raise

    def write_config(self, config: AnyRun) -> None:
        """Write config.yaml with every setting, defaults included."""
        from graft.config import dump_run

        dump_run(config, self.config_path)

    def rewrite_config(self, config: AnyRun) -> None:
        """Replace config.yaml by a configuration whose paths are relative to the present working directory."""
        from graft.config import local_paths

        paths = local_paths(config.model_dump(mode="json"))
        write_json_atomic(self.path / "lock.json", {**self.facts(), "paths": paths, "started_in": self._here()})
        self.write_config(config)

    def status(self, record: Mapping[str, Any]) -> None:
        """Replace status.json by `record`, with process and time added. `record["state"]` is running, finished, stopped or failed."""
        made = {"pid": os.getpid(), "host": socket.gethostname(), "updated": datetime.now(UTC).isoformat()}
        write_json_atomic(self.path / "status.json", {**made, **record})

    def read_status(self) -> dict[str, Any]:
        """Return the content of status.json (empty if there is none). A run that was running and that nobody trains now is "killed".

        The jobs of a run that nobody trains have its state, unless they ended before.
        """
        status = self._status()
        if status.get("state") == "running":
            claimed = is_claimed(self.path)
            here = status.get("host") == socket.gethostname()
            free = claimed is False and (here or file_system(self.path) is None)
            if free or (claimed is None and here and not is_alive(status.get("pid"))):
                status["state"] = "killed"
        if status.get("state") in ("killed", "stopped", "failed"):
            for job in status.get("jobs", {}).values():
                job["state"] = job.get("ended") or status["state"]
        return status

    def last_status(self) -> dict[str, Any]:
        """Return the content of status.json as the last process wrote it; empty if there is none, or if it cannot be read."""
        try:
            return self._status()
        except (GraftError, OSError):
            return {}

    def _status(self) -> dict[str, Any]:
        path = self.path / "status.json"
        return read_json(path) if path.exists() else {}

    def lock(self, **facts: Any) -> None:
        """Write lock.json: versions, platform, the working directory and its git revision, and the caller's facts (hashes, paths)."""
        write_json_atomic(self.path / "lock.json", {**surroundings(), "started_in": self._here(), **facts})

    def _here(self) -> list[str]:
        """The working directory, as seen from this folder and as such."""
        return [os.path.relpath(Path.cwd(), self.path.resolve()), str(Path.cwd())]

    def adapter_dir(self, name: str) -> Path:
        """Return adapters/<name>. Write it through `new_dir`, so that it is replaced as a whole."""
        path = self.path / "adapters" / name
        recover_dir(path)
        return path

    def reference_dir(self, name: str) -> Path:
        """Return the folder of a job's reference: the adapter that its answers are compared with, as it was when the run began."""
        return self.path / "references" / name

    def adapters(self) -> list[str]:
        """Return the names of the saved adapters."""
        return sorted(path.parent.name for path in (self.path / "adapters").glob("[!.]*/adapter_config.json"))

    @property
    def model_dir(self) -> Path:
        """model/: a base that trained itself, as an ordinary model. Write it through `new_dir`."""
        path = self.path / "model"
        recover_dir(path)
        return path

    @property
    def trained_model(self) -> Path | None:
        """The folder of a base that trained itself; None where there is none (yet)."""
        path = self.model_dir
        return path if (path / "config.json").is_file() else None

    def checkpoint_dir(self, step: int) -> Path:
        """Return checkpoints/<step>, with six digits. Write it through `new_dir`, so that an existing folder is always complete."""
        return self.path / "checkpoints" / f"{step:06d}"

    def checkpoints(self) -> list[int]:
        """Return the steps of all complete checkpoints, oldest first."""
        folder = self.path / "checkpoints"
        return sorted(int(path.name) for path in folder.glob("[0-9]*") if path.is_dir() and path.name.isdecimal())


def find_runs(folder: str | Path) -> list[RunFolder]:
    """Find the runs, also damaged ones, in a folder and two levels below, by path. Raises `GraftError` if there is no such folder."""
    folder = Path(folder)
    if not folder.is_dir():
        raise GraftError(f"there is no folder {folder} to look for runs in")
    configs = sorted(path for depth in ("", "*/", "*/*/") for path in folder.glob(depth + "config.yaml"))
    return [RunFolder(path.parent) for path in configs if is_run(path.parent) or may_be_run(path.parent)]

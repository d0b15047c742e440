"""The study folder, and the ways into a study: begin it, go on with it, join it, or only report on it.

study.json     the study as it was given, with the folder where it was started
study.sqlite   its trials (store.py)
packs/<n>/     its joint runs, each an ordinary run folder
report.html  report.md  report.json
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from graft.config import local_paths, relocate
from graft.errors import GraftError
from graft.runs.surroundings import surroundings
from graft.study.definition import Study, read_study
from graft.study.loop import Runner, Say
from graft.study.problems import with_problems
from graft.study.store import FILE
from graft.utils.files import write_json_atomic
from graft.utils.jsonl import read_json

STUDY = "study.json"


def begin(source: Any, changes: Sequence[str], out: Path, *, resume: bool, say: Say, quiet: bool = True) -> Runner:
    """Begin a study in a folder, or go on with the one that is there. Raises `GraftError` for whatever is wrong with it."""
    study = read_study(source, changes)
    there = (out / FILE).exists()
    if there and not resume:
        raise GraftError(f"{out} already holds a study: go on with it with --resume, or name another folder with --out")
    if not there and out.exists() and any(each.name != "problems" for each in out.iterdir()):
        raise GraftError(f"{out} holds files that are not a study: name a new or empty folder with --out")
    return _opened(study, out, say, quiet, not there, study)


def join(out: Path, *, say: Say, quiet: bool = True) -> Runner:
    """Work on the study of a folder, beside the processes that do so already."""
    return _opened(known_study(out), out, say, quiet, False, None)


def known_study(out: Path) -> Study:
    """Return the study of a folder, with paths that lead to its files from the working directory."""
    path = out / STUDY
    if not path.is_file():
        raise GraftError(f"{out} is not the folder of a study: it holds no {STUDY}")
    kept = read_json(path)
    started = [out / kept["started_in"][0], Path(kept["started_in"][1])]
    relocate(kept["study"]["run"], started)
    return read_study(kept["study"])


def _opened(study: Study, out: Path, say: Say, quiet: bool, new: bool, given: Study | None) -> Runner:
    runner = Runner(with_problems(study, out), out, say, quiet)
    runner.begin(known_as(given) if given is not None else None)
    if new:
        here = [os.path.relpath(Path.cwd(), out.resolve()), str(Path.cwd())]
        written = {**study.document.data, "run": study.base.data}
        kept = {"name": study.name, "study": written, "paths": local_paths(study.base.data), "started_in": here}
        write_json_atomic(out / STUDY, {**kept, "environment": surroundings()})
    return runner


def known_as(study: Study) -> dict[str, Any]:
    """Return what a study is known by: everything that its results depend on, but how it is packed."""
    own = study.dump()
    return {
        "study": {key: value for key, value in own["study"].items() if key not in ("together", "memory")},
        "run": own["run"],
    }

"""The adapter folders that a user names, and the runs that they lie in."""

from __future__ import annotations

import re
from pathlib import Path

from graft.config.run import RunConfig
from graft.errors import GraftError
from graft.generation.whole import without_adapter
from graft.runs.folder import RunFolder


def run_adapters(folder: RunFolder) -> list[tuple[str, Path]]:
    """Return name and folder of every adapter of a run."""
    names = folder.adapters()
    if not names:
        raise without_adapter(folder)
    return [(name, folder.adapter_dir(name)) for name in names]


def named_folders(text: str) -> list[tuple[str, Path]]:
    """Return name and folder of the adapters that one --adapter value means: "FOLDER" or "NAME=FOLDER".

    The folder of a run with several adapters, `runs/math`, gives `math-lora`, `math-prefix` and so on.
    """
    name, equals, rest = text.partition("=")
    path = Path(rest if equals and not Path(text).exists() else text)  # a folder's name may contain "="
    given_name = name if str(path) != text else None
    if (path / "config.yaml").is_file() and not (path / "adapter_config.json").is_file():
        inside = run_adapters(RunFolder(path))
        if given_name is not None and len(inside) > 1:
            raise GraftError(
                f"{path} holds several adapters ({', '.join(each for each, _ in inside)}), so {given_name} cannot name them all: "
                "name the folder of one"
            )
        label = given_name or path.resolve().name
        return [(label if len(inside) == 1 else f"{label}-{each}", folder) for each, folder in inside]
    return [(given_name or re.sub(r"[^A-Za-z0-9_\-]", "-", path.resolve().name), path)]


def run_of(text: str) -> Path | None:
    """Return the folder of the run that trained an adapter, named as "FOLDER" or "NAME=FOLDER"; None if it lies in none."""
    folder = named_folders(text)[0][1].resolve()
    return folder.parent.parent if trained_by(folder) is not None else None


def trained_by(folder: Path) -> RunConfig | None:
    """Return the configuration that trained the adapter in this folder, if it is adapters/<name> of a run folder."""
    inside = folder.resolve()
    run = RunFolder(inside.parent.parent)
    if inside.parent.name != "adapters" or not run.config_path.is_file():
        return None
    jobs = run.jobs()
    return next(iter(jobs.values())) if len(jobs) == 1 else jobs.get(inside.name)

"""What a run is trained with, for its lock.json: versions, platform, devices, and the git revision of the working directory."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from graft.version import __version__

PACKAGES = ("torch", "transformers", "tokenizers", "safetensors", "datasets", "pydantic", "numpy")


def surroundings() -> dict[str, Any]:
    """Return the facts about this process and machine, as JSON values."""
    return {
        "graft": __version__,
        "versions": {name: importlib.metadata.version(name) for name in PACKAGES},
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpus": os.cpu_count(),
        "devices": _devices(),
        "git": git_revision(),
        "command": sys.argv,
        "created": datetime.now(UTC).isoformat(),
    }


def git_revision(folder: str | Path | None = None) -> dict[str, Any] | None:
    """Return the commit of the git checkout around a folder, and whether tracked files differ from it; None outside a checkout.

    folder: default is the working directory.
    """
    commands = (["git", "rev-parse", "HEAD"], ["git", "status", "--porcelain", "--untracked-files=no"])
    try:
        answers = [subprocess.run(line, cwd=folder, capture_output=True, text=True, timeout=10) for line in commands]
    except (FileNotFoundError, subprocess.TimeoutExpired):
        return None
    if any(answer.returncode for answer in answers):
        return None
    return {"commit": answers[0].stdout.strip(), "changed": bool(answers[1].stdout.strip())}


def _devices() -> list[str]:
    """Return the names of the GPUs if torch has been imported; do not import it for this."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_available():
        return []
    return [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]

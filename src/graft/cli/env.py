"""graft env: describe this machine and this installation."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
from typing import Any

import typer

from graft.cli.common import AsJson, print_facts, print_json


def command(as_json: AsJson = False) -> None:
    """Show versions, CPU cores, memory, GPUs and optional extras of this installation.

    Example: graft env --json
    """
    facts = environment()
    if as_json:
        print_json(facts)
        return
    memory = {name: f"{size / 2**30:.1f} GiB" for name, size in facts["memory_bytes"].items()}
    devices = [f"{device['name']} ({device['memory_bytes'] / 2**30:.0f} GiB)" for device in facts["devices"]]
    print_facts(
        {
            "graft": facts["graft"],
            "python": f"{facts['python']} on {facts['platform']}",
            "cores": f"{facts['cores']['usable']} of {facts['cores']['all']}",
            "memory": ", ".join(f"{size} {name}" for name, size in memory.items()),
            "devices": ", ".join(devices) or "no GPU: everything runs on the CPU",
            "kernels": facts["kernels"],
        }
    )
    typer.echo("\nVersions")
    print_facts({f"  {name}": version for name, version in facts["versions"].items()})
    typer.echo("\nExtras")
    for name, packages in facts["extras"].items():
        missing = [package for package, version in packages.items() if version is None]
        state = f"missing {', '.join(missing)}: pip install 'graft-llm[{name}]'" if missing else "installed"
        typer.echo(f"  {name:<9}  {state}")


def environment() -> dict[str, Any]:
    """Return the facts as plain values."""
    import torch

    from graft.kernels import described
    from graft.runs.surroundings import PACKAGES
    from graft.version import __version__

    cuda = torch.cuda.is_available()
    properties = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())] if cuda else []
    return {
        "graft": __version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cores": {
            "usable": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
            "all": os.cpu_count(),
        },
        "memory_bytes": _memory(),
        "devices": [{"name": device.name, "memory_bytes": device.total_memory} for device in properties],
        "bfloat16_gpu": cuda and torch.cuda.is_bf16_supported(),
        "kernels": described(),
        "threads": torch.get_num_threads(),
        "versions": {name: _version(name) for name in (*PACKAGES, "typer", "rich", "ruamel.yaml")},
        "extras": extras(),
    }


USED = ("eval", "federated", "gpu", "quant", "report", "search", "serve", "track", "vllm")
"""The extras that code of this version uses."""


def extras() -> dict[str, dict[str, str | None]]:
    """Return the packages of each extra that code uses, with their installed versions; None is a missing package."""
    found: dict[str, dict[str, str | None]] = {}
    for requirement in importlib.metadata.requires("graft-llm") or []:
        name, extra = re.match(r"[\w.-]+", requirement), re.search(r"extra == ['\"]([\w-]+)", requirement)
        if name and extra and extra[1] in USED:
            found.setdefault(extra[1], {})[name[0]] = _version(name[0])
    return found


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _memory() -> dict[str, int]:
    """Return the bytes of main memory, as far as the system reports them."""
    names = {"all": "SC_PHYS_PAGES", "free": "SC_AVPHYS_PAGES"}
    page = os.sysconf("SC_PAGE_SIZE")
    return {key: os.sysconf(name) * page for key, name in names.items() if name in os.sysconf_names}

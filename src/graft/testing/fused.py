"""Adapters that stand for others in folders, as cases of the contract: their folders are made when they are first asked for.

A kind by reference means nothing without trained adapters of the same base, so such a case is not a config but a function of the family.
"""

from __future__ import annotations

import atexit
import functools
import json
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from graft.attaching.attach import attach
from graft.attaching.saving import save
from graft.testing.bases import tiny_base
from graft.testing.case import randomise


def fusion(*of: Any, **settings: Any) -> Callable[[str], Any]:
    """Return a function of a family's name that returns a fusion of trained adapters of these configs."""
    return lambda family: {"kind": "fusion", "of": list(_folders(family, json.dumps(of))), **settings}


@functools.cache
def _folders(family: str, configs: str) -> tuple[str, ...]:
    """Return folders of adapters of a tiny base, with weights of their own. They go with the process."""
    place = Path(tempfile.mkdtemp())
    atexit.register(shutil.rmtree, place, ignore_errors=True)
    with torch.random.fork_rng():
        torch.manual_seed(11)
        model = tiny_base(family)
        attach(model, {f"t{number}": config for number, config in enumerate(json.loads(configs))})
    found = []
    for number in range(len(json.loads(configs))):
        randomise(model, f"t{number}", 50 + number)
        found.append(str(save(model, f"t{number}", place / f"t{number}")))
    return tuple(found)

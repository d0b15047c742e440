"""The state of all models in training at one moment, on the disk: adapters, optimisers, and the gradients that no step has used yet."""

from __future__ import annotations

from pathlib import Path

import torch

from graft.adapters.parsing import parse
from graft.formats.own import read_header
from graft.training.session import Session
from graft.training.tensor_files import load_tensors, save_tensors
from graft.utils.files import new_dir, write_json_atomic
from graft.utils.jsonl import read_json

INDEX, GRADIENTS, ASKS = "tenants.json", "gradients.safetensors", "asks"


def write_snapshot(session: Session, folder: Path) -> None:
    """Write the state of a session as a whole."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with new_dir(folder) as fresh:
        write_json_atomic(fresh / INDEX, {name: tenant.seed for name, tenant in session.tenants.items()})
        for name, tenant in session.tenants.items():
            session.save(name, fresh / name)
            save_tensors({**tenant.sums, ASKS: torch.tensor(tenant.asks)}, fresh / name / GRADIENTS)


def restore_snapshot(session: Session, folder: Path) -> None:
    """Put a new session where `write_snapshot` left one. Raises `GraftError` for a damaged folder, and for another base."""
    for name, seed in read_json(folder / INDEX).items():
        tenant = session.open(name, parse(read_header(folder / name)["adapter"]), seed)  # pyright: ignore[reportArgumentType]
        session.load(name, folder / name)
        sums = load_tensors(folder / name / GRADIENTS)
        tenant.asks = int(sums.pop(ASKS))
        tenant.sums = {key: value.to(tenant.trainable.params[key].device) for key, value in sums.items()}

"""Save the rows of a step in which a loss or gradient was not finite, so that they can be read without Graft."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import save_file

from graft.runs.folder import RunFolder
from graft.training.step import NonFinite
from graft.utils.files import new_dir, write_json_atomic


def save_failed_batch(folder: RunFolder, error: NonFinite, name: str = "failed_batch") -> Path:
    """Write the folder `name` of the run folder: batch.safetensors and samples.json. Returns its path.

    batch.safetensors has input_ids and supervised of all rows, laid end to end, and the rows' lengths. samples.json has the file and row of
    each, and whether it is a suspect.
    """
    examples = [row.example for row in error.rows]
    path = folder.path / name
    with new_dir(path) as fresh:
        tensors = {
            "input_ids": torch.cat([torch.as_tensor(example.input_ids) for example in examples]),
            "supervised": torch.cat([torch.as_tensor(example.supervised) for example in examples]),
            "lengths": torch.tensor([len(example.input_ids) for example in examples]),
        }
        save_file(tensors, fresh / "batch.safetensors")
        samples = [
            {"source": row.example.source, "row": row.example.row, "suspect": row in error.suspects}
            for row in error.rows
        ]
        write_json_atomic(
            fresh / "samples.json",
            {"job": error.job.name, "step": error.job.step + 1, "what": error.what, "samples": samples},
        )
    return path

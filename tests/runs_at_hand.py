"""A run folder as training leaves it, made in a moment: a tiny base, an adapter with random weights, its template."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

import graft
from graft.config import load_run
from graft.data.templates import template_of
from graft.runs.folder import RunFolder
from tests.small import save_small, small_tokenizer

ROWS = [
    {"question": "What is 1 plus 2?", "answer": "1 + 2 = 3\n#### 3"},
    {"question": "What is 40 plus 2, and is that more than three eggs in a box of twelve?", "answer": "#### 42"},
    {"question": "Two and two?", "answer": "4"},
]


def write_rows(path: Path, rows: list[dict[str, Any]] | None = None) -> Path:
    """A JSONL file."""
    path.write_text("".join(json.dumps(row) + "\n" for row in (ROWS if rows is None else rows)))
    return path


def make_run(
    folder: Path, adapters: dict[str, Any], *, seed: int = 1, data: dict[str, Any] | None = None, **base: Any
) -> Path:
    """A run with adapters by name, beside its base and its data."""
    model_folder = folder.parent / f"{folder.name}-base"
    save_small(model_folder, **base)
    rows = write_rows(folder.parent / f"{folder.name}.jsonl")
    settings = {"train": str(rows), "template": "plain", **(data or {})}
    first = next(iter(adapters.values()))
    config = load_run({"base": {"model": str(model_folder), "device": "cpu"}, "adapter": first, "data": settings})
    run = RunFolder(folder).create()
    run.write_config(config)
    run.status({"state": "finished"})
    from graft.bases import load_base

    loaded = load_base(config.base)
    template = template_of(settings["template"], small_tokenizer())
    graft.attach(loaded.model, adapters)
    torch.manual_seed(seed)
    for name in adapters:
        with torch.no_grad():
            for _, parameter in graft.parameters(loaded.model, name):
                parameter.normal_(std=0.3)
        graft.save(loaded.model, name, run.adapter_dir(name))
        template.save(run.adapter_dir(name))
    return folder

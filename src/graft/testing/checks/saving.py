"""Saving: a saved adapter computes the same in a fresh process, and its file holds exactly what was promised."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from graft.adapters.files import CONFIG, WEIGHTS
from graft.attaching.attach import attach
from graft.attaching.parameters import tensors
from graft.attaching.saving import save
from graft.formats.loading import load
from graft.injection.state import state_of
from graft.testing.bases import ids, logits, tiny_base
from graft.testing.case import Case
from graft.testing.checks.promise import equal, holds, listed, promise
from graft.testing.fresh_process import FreshProcess

ADVICE = "keep what the forward pass needs in parameters or persistent buffers, or make it from a seed in the config"


@promise(
    "The file of a saved adapter holds exactly the adapter's parameters and persistent buffers, all of them in use."
)
def check_file_holds_the_promised_tensors(case: Case) -> None:
    with tempfile.TemporaryDirectory() as folder:
        saved = save(case.attached(), "a", Path(folder) / "a")
        stored, files = load_file(saved / WEIGHTS), sorted(path.name for path in saved.iterdir())
    model: Any = tiny_base(case.family)
    attach(model, {"a": case.config.collapsed()})
    promised = {name: (tuple(t.shape), t.dtype) for name, t in tensors(model, state_of(model), "a")}
    found = {name: (tuple(t.shape), t.dtype) for name, t in stored.items()}
    apart = sorted(name for name in {*promised, *found} if promised.get(name) != found.get(name))
    if apart:
        name = apart[0]
        holds(
            False,
            f"the file holds the parameters and persistent buffers of `collapsed()`; it differs at {listed(apart)}: promised "
            f"{promised.get(name, 'nothing')}, found {found.get(name, 'nothing')} for the first",
        )
    empty = [name for name, t in stored.items() if not (t.numel() and t.isfinite().all() and t.any())]
    holds(not empty, f"the file holds tensors that are empty, all zero or not finite: {listed(empty)}")
    holds(files == [CONFIG, WEIGHTS], f"the folder holds {CONFIG} and {WEIGHTS}; found {listed(files, 9)}")


@promise("A saved adapter loads into a new base, computes the same bit for bit, and is saved again to the same file.")
def check_loads_back_the_same(case: Case) -> None:
    model, inputs = case.attached(), ids()
    expected, other = logits(model, inputs), tiny_base(case.family)
    with tempfile.TemporaryDirectory() as folder, torch.random.fork_rng():
        torch.manual_seed(987)  # another state of the random generator than the saved adapter was made with
        saved = save(model, "a", Path(folder) / "a")
        load(other, saved, name="a")
        equal(logits(other, inputs), expected, "a loaded adapter computes what the saved one does", ADVICE)
        again = save(other, "a", Path(folder) / "again")
        for file in (WEIGHTS, CONFIG):
            same = (again / file).read_bytes() == (saved / file).read_bytes()
            holds(same, f"what is loaded is saved again to the same {file}, byte for byte; it differs")


@promise("A saved adapter computes the same bit for bit in a fresh process.")
def check_fresh_process_computes_the_same(case: Case) -> None:
    process = case.process
    if process is None:
        process = FreshProcess()
        process.add(case)
    here, there = process.outputs(case)
    equal(there, here, "a fresh process computes of the saved adapter what this one does", ADVICE)

"""What a fresh process computes of saved adapters. One process serves all cases, because importing torch takes seconds.

This process saves each case's adapter to a folder with its logits; `python -m graft.testing.fresh_process FOLDER` loads each and
computes them again.
"""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import subprocess
import sys
import tempfile
import weakref
from collections.abc import Collection
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from graft.adapters.registry import register
from graft.attaching.saving import save
from graft.errors import GraftError
from graft.formats.loading import load
from graft.testing.bases import ids, logits, tiny_base
from graft.testing.case import Case, DoesNotApply
from graft.testing.kind_files import imported, source_of

HERE, THERE, CASES, ERRORS = "here.safetensors", "there.safetensors", "cases.json", "errors.json"


class FreshProcess:
    """The process that loads the saved adapters of all cases that were added. It runs when the first of them is asked for."""

    def __init__(self, folder: Path | None = None, pickled: Collection[str] = ()) -> None:
        """folder: where adapters are saved; None: a temporary one. pickled: ids of cases whose whole model is pickled as well."""
        self._folder, self._pickled, self._ran = folder, pickled, False
        self._cases: list[Case] = []
        self._errors: dict[str, tuple[str, str]] = {}

    def add(self, case: Case) -> Case:
        """Return the case as one of this process."""
        case = dataclasses.replace(case, process=self)
        self._cases.append(case)
        return case

    def folder(self) -> Path:
        """Return the folder with a saved adapter per case, under the case's id. Runs the process unless it has run."""
        if self._folder is None:
            self._folder = Path(tempfile.mkdtemp())
            weakref.finalize(self, shutil.rmtree, self._folder, ignore_errors=True)
        if not self._ran:
            self._ran = True
            if not self._save_all(self._folder):
                return self._folder
            command = [sys.executable, "-m", "graft.testing.fresh_process", str(self._folder)]
            environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
            done = subprocess.run(command, env=environment, timeout=600, capture_output=True, text=True)
            assert done.returncode == 0, f"the fresh process failed: {done.stderr[-2000:]}"
            self._errors |= json.loads((self._folder / ERRORS).read_text())
        return self._folder

    def outputs(self, case: Case, pickled: bool = False) -> tuple[Tensor, Tensor]:
        """Return the logits of a case in this process and in the fresh one; pickled: there, those of the pickled model.

        Raises AssertionError where saving or loading failed, and `DoesNotApply` where no other process can import the kind.
        """
        folder = self.folder()
        if case.id in self._errors:
            reason, error = self._errors[case.id]
            raise DoesNotApply(error) if reason == "does not apply" else AssertionError(error)
        here, there = load_file(folder / HERE), load_file(folder / THERE)
        return here[case.id], there[f"{case.id}.pickle" if pickled else case.id]

    def _save_all(self, folder: Path) -> bool:
        """Save every case's adapter, and return whether there is any to load."""
        threads, outputs, listed = torch.get_num_threads(), {}, []
        torch.set_num_threads(1)
        for case in self._cases:
            try:
                kinds = source_of(case.config)
            except GraftError as error:
                self._errors[case.id] = ("does not apply", str(error))
                continue
            try:
                model = case.attached()
                save(model, "a", folder / case.id)
                outputs[case.id] = logits(model, ids()).contiguous()
                if case.id in self._pickled:
                    torch.save(model, folder / f"{case.id}.pickle")
            except Exception as error:  # a stranger's kind may fail in any way; the other cases still run
                self._errors[case.id] = ("failed", f"saving failed: {type(error).__name__}: {error}")
                continue
            listed.append({"id": case.id, "family": case.family, "kinds": kinds, "pickled": case.id in self._pickled})
        save_file(outputs, folder / HERE)
        (folder / CASES).write_text(json.dumps(listed))
        torch.set_num_threads(threads)
        return bool(listed)


def main(folder: Path) -> None:
    """Load every saved adapter of a folder and write what it computes."""
    torch.set_num_threads(1)
    torch.manual_seed(987)  # another state of the random generator than the saving process had
    outputs, errors = {}, {}
    for case in json.loads((folder / CASES).read_text()):
        try:
            for source in case["kinds"]:
                _register(source)
            model = tiny_base(case["family"])
            load(model, folder / case["id"], name="loaded")
            outputs[case["id"]] = logits(model, ids()).contiguous()
            if case["pickled"]:
                pickled = torch.load(folder / f"{case['id']}.pickle", weights_only=False)
                outputs[f"{case['id']}.pickle"] = logits(pickled, ids()).contiguous()
        except Exception as error:  # a stranger's kind may fail in any way; the other cases still run
            errors[case["id"]] = ("failed", f"loading in a fresh process failed: {type(error).__name__}: {error}")
    save_file(outputs, folder / THERE)
    (folder / ERRORS).write_text(json.dumps(errors))


def _register(source: dict[str, str]) -> None:
    module = sys.modules.get(source["module"]) or imported(Path(source["file"]), source["module"])
    register(getattr(module, source["class"]))


if __name__ == "__main__":
    main(Path(sys.argv[1]))

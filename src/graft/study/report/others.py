"""The result files of PEFT's method_comparison (huggingface/peft, method_comparison/MetaMathQA/results), as entries of a ranking.

A file is one run with one seed: its test accuracy over the questions of GSM8K, which it gives as a share. Keys beside those below are
facts about the machine and the run that no number here depends on; they are left out.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from graft.errors import GraftError
from graft.study.report.ranking import Entry

QUESTIONS = {"gsm8k": 1319}
"""Test questions of the data sets that these files name."""
ACCURACY = "test accuracy"


class _Foreign(BaseModel):
    """A part of a file of another project, of which only these keys are read."""

    model_config = ConfigDict(frozen=True, extra="ignore")


class _RunInfo(_Foreign):
    experiment_name: str
    train_config: dict[str, Any] = Field(default_factory=dict)


class _TrainInfo(_Foreign):
    status: str
    num_trainable_params: int | None = None
    train_time: float | None = None
    accelerator_memory_max: int | None = None
    metrics: list[dict[str, Any]] = Field(default_factory=list)


class _MetaInfo(_Foreign):
    dataset_info: dict[str, Any] = Field(default_factory=dict)


class _Result(_Foreign):
    run_info: _RunInfo
    train_info: _TrainInfo
    meta_info: _MetaInfo = Field(default_factory=_MetaInfo)


def result_files(path: Path) -> list[Path]:
    """Return the result files of PEFT that a path names: itself, or those in its folder; none if it is something else."""
    if path.is_file() and path.suffix == ".json":
        return [path]
    if path.is_dir() and not (path / "config.yaml").exists():
        return sorted(each for each in path.glob("*.json") if _looks_like(each))
    return []


def _looks_like(path: Path) -> bool:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(value, dict) and {"run_info", "train_info"} <= set(value)


def read_results(files: Sequence[Path]) -> tuple[list[Entry], list[str]]:
    """Return an entry per file, and a note for each file of a run that did not succeed.

    Raises `GraftError` for a file of another shape, and for an accuracy that is no share of the questions.
    """
    entries, notes = [], []
    for path in files:
        result = _read(path)
        found = [each[ACCURACY] for each in result.train_info.metrics if ACCURACY in each]
        if result.train_info.status != "success" or not found:
            notes.append(f"{path.name} is left out: its status is {result.train_info.status}")
            continue
        total = _questions(path, result)
        correct = round(found[-1] * total)
        if abs(correct - found[-1] * total) > 1e-3:
            raise GraftError(f"{path}: a test accuracy of {found[-1]} is no share of {total:,} questions")
        facts = {
            "parameters": result.train_info.num_trainable_params,
            "seconds": result.train_info.train_time,
            "peak_bytes": result.train_info.accelerator_memory_max,
            "lr": (result.run_info.train_config.get("optimizer_kwargs") or {}).get("lr"),
        }
        seed = result.run_info.train_config.get("seed")
        entries.append(
            Entry(
                result.run_info.experiment_name,
                (correct / total,),
                (seed,) if isinstance(seed, int) else (),
                counts=(correct, total),
                facts=facts,
            )
        )
    if not entries:
        raise GraftError("there is no result to rank: " + "; ".join(notes))
    return entries, notes


def _read(path: Path) -> _Result:
    try:
        return _Result.model_validate_json(path.read_bytes())
    except ValidationError as error:
        first = error.errors()[0]
        raise GraftError(
            f"{path} is not a result of PEFT's method_comparison: {'.'.join(map(str, first['loc'])) or 'the file'}: {first['msg']}"
        ) from error


def _questions(path: Path, result: _Result) -> int:
    known = [QUESTIONS[name] for name in result.meta_info.dataset_info if name in QUESTIONS]
    if not known:
        raise GraftError(f"{path} names no data set whose number of test questions is known ({', '.join(QUESTIONS)})")
    return known[0]

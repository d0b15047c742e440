"""Evaluate a base and its adapters (the candidates) on data files, benchmarks and lm-eval's tasks.

- `evaluating` holds the entry points: they load the data, choose what to do with it and return the results.
- `datafile`, `benchmark`, `labels` and `preferences` evaluate on a data file, on one of `tasks` under one of `protocols`, on
  labelled texts, and on pairs of answers. `answering` and `ranking` ask the questions; `lm_eval` leaves that to lm-eval.
- `journal` keeps the answers in a folder, so that an interrupted evaluation can continue.
- `answers`, `scoring`, `metrics` and `statistics` turn judged answers into scores with intervals.
- `results`, `tables`, `differences` and `comparison` read results again, put them side by side and compare them.

The public names are imported on first use, so that scoring a file of outputs does not import torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from graft.evaluation.evaluating import evaluate, evaluate_jobs, evaluate_on, evaluate_tasks

__all__ = ["evaluate", "evaluate_jobs", "evaluate_on", "evaluate_tasks"]


def __getattr__(name: str) -> Any:
    if name in __all__:
        return getattr(importlib.import_module("graft.evaluation.evaluating"), name)
    raise AttributeError(f"module 'graft.evaluation' has no attribute '{name}'")

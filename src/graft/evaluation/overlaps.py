"""What is known of the questions of an evaluation in the training data of those who answer them.

The training data of an adapter are known where its folder lies in the run that trained it. A score on questions that an
adapter has seen says what it remembers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from graft.config.data import DataConfig
from graft.data.overlap import Question, overlap_reports
from graft.data.preparing import samples_of
from graft.errors import GraftError
from graft.generation.loaded import LoadedModel


def known_overlaps(loaded: LoadedModel, tests: Mapping[str, Sequence[Question]]) -> dict[str, list[dict[str, Any]]]:
    """Test set -> one report for each training data that is known: `of` which adapters, and counts, or why they are unknown."""
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in tests}
    for adapters, data in _trained_on(loaded):
        for name, report in _reports(data, tests).items():
            found[name].append({"of": adapters, **report})
    return found


def _trained_on(loaded: LoadedModel) -> list[tuple[list[str], DataConfig]]:
    """The adapters that share their training data, and these."""
    found: dict[str, tuple[list[str], DataConfig]] = {}
    for candidate in loaded.adapters:
        if candidate.trained is not None:
            data = candidate.trained.data
            found.setdefault(data.model_dump_json(), ([], data))[0].append(candidate.name)
    return list(found.values())


def _reports(data: DataConfig, tests: Mapping[str, Sequence[Question]]) -> dict[str, dict[str, Any]]:
    try:
        trained = [sample for source in samples_of(data)[0] for sample in source]
    except GraftError as error:  # the data are not here, which is no reason not to evaluate
        return {name: {"unknown": str(error)} for name in tests}
    return {name: report.to_dict() for name, report in overlap_reports(trained, tests).items()}

"""Benchmarks of classification and regression for adapters that label texts: the raw rows, with labels as the adapter knows them.

A benchmark writes a class as a number or as a name ("0", "entailment", "not_entailment"), and so did the data that an adapter was
trained on. A label is matched to the adapter's classes in any of these forms.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from graft.data.labelled_shapes import labelled_shape
from graft.data.labelling import Labelling, LabelTemplate
from graft.data.samples import Sample
from graft.errors import GraftError
from graft.evaluation.tasks import Task
from graft.evaluation.tasks.sources import read_rows
from graft.generation.loaded import LoadedModel

_KINDS = {"classification": "class", "regression": "score"}
"""Task of a base -> the kind of answer of the benchmarks that it can be evaluated on."""


def labelled_rows(task: Task, kind: str, data: str | Path | None, limit: int | None) -> list[Sample]:
    """Read the first `limit` rows (None: all) of a benchmark as labelled samples. kind: classification or regression.

    Raises `GraftError` for a benchmark of another kind, and as `Task.load` does.
    """
    if task.answer != _KINDS[kind]:
        raise GraftError(
            f"'{task.name}' is no task of {kind}, which the adapter was trained for: name others with --tasks"
        )
    source, rows = read_rows(task.name, data, task.places, task.hub, task.reader)
    shape = labelled_shape(dict.fromkeys(name for row in rows for name in row), "auto", source, kind, True)
    samples = []
    for number, row in enumerate(rows[:limit], start=1):
        try:
            samples.append(Sample(tuple(shape.convert(row, True)), source, number))
        except GraftError as error:
            raise GraftError(f"{source}, row {number}: {error}") from error
    return samples


def fitted(loaded: LoadedModel, task: Task, samples: Sequence[Sample]) -> tuple[LoadedModel, list[Sample], list[str]]:
    """Choose the candidates whose classes are those of the benchmark, and write the labels as these candidates know them.

    Returns (the model with these candidates, the samples, the names of the other candidates). Raises `GraftError` if there is no
    such candidate.
    """
    if loaded.base.task == "regression":
        return loaded, list(samples), []
    found = {each.name: _translated(_labelling(each.template), task, samples) for each in loaded.candidates}
    chosen = next((own for own in found.values() if own is not None), None)
    if chosen is None:
        labels = sorted({str(sample.answer) for sample in samples})
        known = "; ".join(dict.fromkeys(_labelling(each.template).name for each in loaded.candidates))
        raise GraftError(
            f"the classes of '{task.name}' ({', '.join(labels[:12])}) are not those that the adapter was trained with ({known})"
        )
    fits = tuple(each for each in loaded.candidates if found[each.name] == chosen)
    left = [each.name for each in loaded.candidates if each not in fits]
    return replace(loaded, candidates=fits), chosen, left


def _labelling(template: object) -> Labelling:
    assert isinstance(template, LabelTemplate)
    return template.labelling


def _translated(labelling: Labelling, task: Task, samples: Sequence[Sample]) -> list[Sample] | None:
    """Return the samples with labels that the labelling knows; None if one of them is unknown to it."""
    known = {_plain(label): label for label in (*labelling.names, *labelling.labels)}
    found = []
    for sample in samples:
        forms = [_plain(str(sample.answer))]
        if forms[0].isdecimal() and int(forms[0]) < len(task.labels):
            forms.append(_plain(task.labels[int(forms[0])]))
        elif forms[0] in (names := [_plain(label) for label in task.labels]):
            forms.append(str(names.index(forms[0])))
        label = next((known[form] for form in forms if form in known), None)
        if label is None:
            return None
        found.append(replace(sample, messages=(*sample.prompt, {"role": "assistant", "content": label})))
    return found


def _plain(label: str) -> str:
    return label.strip().replace("_", " ").casefold()

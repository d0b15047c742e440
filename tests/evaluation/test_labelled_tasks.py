"""Benchmarks for adapters that label texts: labels in any of their forms, and what does not fit."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from graft.cli import _with_lists
from graft.data.labelling import Labelling, LabelTemplate
from graft.errors import GraftError
from graft.evaluation import tasks
from graft.evaluation.labelled_tasks import fitted, labelled_rows
from graft.generation.loaded import Candidate, LoadedModel

RTE = "index\tsentence1\tsentence2\tlabel\n0\tIt rains.\tIt is wet.\tentailment\n1\tIt rains.\tIt is dry.\tnot_entailment\n"


def loaded(**labels: tuple[str, ...]) -> LoadedModel:
    base: Any = SimpleNamespace(task="classification")
    candidates = [
        Candidate(name, name, LabelTemplate.of(Labelling("classification", own, own))) for name, own in labels.items()
    ]
    return LoadedModel(base, tuple(candidates))


@pytest.fixture
def data(tmp_path: Path) -> Path:
    (tmp_path / "RTE").mkdir()
    (tmp_path / "RTE" / "dev.tsv").write_text(RTE)
    return tmp_path


@pytest.mark.parametrize(
    ("labels", "known"),
    [
        (("entailment", "not_entailment"), ["entailment", "not_entailment"]),
        (("not entailment", "entailment"), ["entailment", "not entailment"]),
        (("0", "1"), ["0", "1"]),
    ],
)
def test_labels_are_written_as_the_adapter_knows_them(data: Path, labels: tuple[str, ...], known: list[str]) -> None:
    rows = labelled_rows(tasks.get("rte"), "classification", data, None)
    assert [row.prompt[0]["content"] for row in rows] == ["It rains."] * 2 and len(rows[0].prompt) == 2
    own, samples, others = fitted(loaded(one=labels), tasks.get("rte"), rows)
    assert [sample.answer for sample in samples] == known and others == [] and len(own.candidates) == 1


def test_adapters_with_other_classes_are_left_out_and_named(data: Path) -> None:
    rows = labelled_rows(tasks.get("rte"), "classification", data, 1)
    own, _, others = fitted(loaded(sst2=("negative", "positive"), rte=("0", "1")), tasks.get("rte"), rows)
    assert [each.name for each in own.candidates] == ["rte"] and others == ["sst2"]
    with pytest.raises(
        GraftError, match=r"the classes of 'rte' \(entailment\) are not those .* \(negative / positive\)"
    ):
        fitted(loaded(sst2=("negative", "positive")), tasks.get("rte"), rows)


def test_a_benchmark_of_another_kind_is_an_error(data: Path) -> None:
    for name in ("gsm8k", "stsb", "e2e"):
        with pytest.raises(GraftError, match=f"'{name}' is no task of classification"):
            labelled_rows(tasks.get(name), "classification", data, None)


def test_a_list_may_be_written_with_spaces() -> None:
    assert _with_lists(["eval", "run", "--tasks", "rte,", "mrpc", "--json"]) == [
        "eval",
        "run",
        "--tasks",
        "rte,mrpc",
        "--json",
    ]
    assert _with_lists(["eval", "--tasks", "a,", "b,", "c", "run"]) == ["eval", "--tasks", "a,b,c", "run"]
    assert _with_lists(["eval", "run,", "--tasks", "a"]) == ["eval", "run,", "--tasks", "a"]

"""Classes and values of texts: scores against scikit-learn and SciPy, several adapters at once, files, and the two verbs."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.metrics import confusion_matrix, f1_score, matthews_corrcoef
from transformers import AutoModelForSequenceClassification, AutoTokenizer

import graft
from graft.bases.heads import draw_head, with_head
from graft.cli import main
from graft.config import load_run
from graft.config.base import BaseConfig
from graft.data.labelling import Labelling
from graft.errors import GraftError
from graft.evaluation import evaluate, evaluate_on, evaluate_tasks
from graft.generation.loaded import load_candidates
from graft.runs.folder import RunFolder
from graft.training import check, train
from tests.task_bases import labelled_rows, save_task_base
from tests.walk import graft_command


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def settings(root: Path, rows: list[dict[str, Any]], task: str = "classification", **data: Any) -> dict[str, Any]:
    base = root / "base"
    if not base.exists():
        save_task_base(base, "bert")
    return {
        "base": {"model": str(base), "device": "cpu"},
        "adapter": {"kind": "lora", "rank": 4, "sites": "linear"},
        "data": {"task": task, "train": str(write(root / f"{task}.jsonl", rows)), "cache": False, **data},
        "train": {"steps": 60, "lr": 1e-2, "batch_size": 4},
    }


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    root = tmp_path_factory.mktemp("labels")
    return train(load_run(settings(root, labelled_rows(), validation=6)), root / "run", quiet=True)


def adapter_with_random_head(run: RunFolder, folder: Path, seed: int) -> Path:
    """Another adapter for the same classes, in a folder as a run leaves it."""
    loaded = load_candidates(run)
    model = loaded.base.model
    draw_head(model, loaded.base.fresh, seed)
    graft.attach(model, {"other": with_head(model, graft.Series(bottleneck=4, sites="mlp"), loaded.base.fresh)})
    graft.save(model, "other", folder)
    Labelling("classification", ("neg", "pos"), ("neg", "pos")).save(folder)
    return folder


def test_a_trained_adapter_tells_the_classes_apart_and_the_scores_are_the_libraries_own(
    run: RunFolder, tmp_path: Path
) -> None:
    rows = [*labelled_rows(20), {"text": "good and bright", "label": "neg"}, {"text": "bad", "label": "pos"}]
    result = evaluate(run, write(tmp_path / "test.jsonl", rows))
    (found,) = result["results"]  # a base without a head of its own has nothing to say
    lines = [json.loads(line) for line in (Path(result["folder"]) / "answers.jsonl").read_text().splitlines()]
    gold, given = [row["label"] for row in rows], [line["answer"] for line in lines]
    assert found["correct"] == sum(a == b for a, b in zip(gold, given, strict=True)) >= 20
    assert found["f1"] == pytest.approx(f1_score(gold, given, pos_label="pos"))
    assert found["matthews"] == pytest.approx(matthews_corrcoef(gold, given))
    most = max(gold.count("neg"), gold.count("pos"))
    assert result["majority"] == {"label": max(gold, key=gold.count), "accuracy": most / len(gold)}
    table = confusion_matrix(gold, given, labels=["neg", "pos"])
    assert [[found["confusion"][a][b] for b in ("neg", "pos")] for a in ("neg", "pos")] == table.tolist()
    assert found["interval"][0] < found["accuracy"] < found["interval"][1] and found["f1_interval"] is not None
    right = [-np.log(line["probabilities"][row["label"]]) for line, row in zip(lines, rows, strict=True)]
    assert found["loss"] == pytest.approx(np.mean(right), abs=1e-4)


def test_benchmarks_are_evaluated_on_the_labels_of_their_rows(
    run: RunFolder, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = write(tmp_path / "sentiment.jsonl", labelled_rows(8))
    found = evaluate_tasks(load_candidates(run), "classification", "strict", data, None)
    alone = evaluate(run, data)
    assert found["tasks"][0]["results"][0]["accuracy"] == alone["results"][0]["accuracy"]
    assert found["tasks"][0]["protocol"]["classes"] == ["neg", "pos"] and found["absent"] == []
    with pytest.raises(SystemExit) as end:
        main(["eval", str(run.path), "--tasks", "classification", "--data", str(data), "--protocol", "strict"])
    assert end.value.code == 2
    assert "--protocol has no effect on adapters for classification" in capsys.readouterr().err


def test_what_plain_transformers_says_of_the_loaded_adapter_is_what_eval_says(run: RunFolder, tmp_path: Path) -> None:
    torch.manual_seed(77)
    folder = run.config.base.model
    model = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=2).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    graft.load(model, run.adapter_dir("lora"))
    rows = labelled_rows(7)
    result = evaluate(run, write(tmp_path / "test.jsonl", rows))
    lines = [json.loads(line) for line in (Path(result["folder"]) / "answers.jsonl").read_text().splitlines()]
    for row, line in zip(rows, lines, strict=True):
        with torch.no_grad():
            theirs = model(**tokenizer(row["text"], return_tensors="pt")).logits.softmax(-1)[0]
        assert [line["probabilities"][name] for name in ("neg", "pos")] == pytest.approx(theirs.tolist(), abs=2e-5)


def test_adapters_with_different_heads_answer_together_what_they_answer_alone(run: RunFolder, tmp_path: Path) -> None:
    other = adapter_with_random_head(run, tmp_path / "other", seed=5)
    data = write(tmp_path / "test.jsonl", labelled_rows(9))
    base = BaseConfig(model=run.config.base.model, device="cpu")
    folders = {"lora": str(run.adapter_dir("lora")), "other": str(other)}
    together = evaluate_on(
        load_candidates(None, base, [f"{name}={path}" for name, path in folders.items()]), data, None
    )
    for result in together["results"]:
        name = result["name"]
        (alone,) = evaluate_on(load_candidates(None, base, [f"{name}={folders[name]}"]), data, None)["results"]
        assert result["loss"] == pytest.approx(alone["loss"], abs=1e-5)
    losses = [result["loss"] for result in together["results"]]
    assert abs(losses[0] - losses[1]) > 1e-2


def test_the_runs_own_validation_data_are_asked_without_a_file(run: RunFolder) -> None:
    (found,) = evaluate(run)["results"]
    assert found["total"] == 6 and found["loss"] == pytest.approx(
        run.read_status()["jobs"]["lora"]["best"]["loss"], abs=1e-5
    )


def test_an_unknown_label_of_the_file_is_an_error_with_its_row(run: RunFolder, tmp_path: Path) -> None:
    data = write(tmp_path / "test.jsonl", [{"text": "x", "label": "pos"}, {"text": "y", "label": "maybe"}])
    with pytest.raises(GraftError, match=r"test\.jsonl, row 2: the label 'maybe' is not one of the classes neg, pos"):
        evaluate(run, data)


def test_a_text_longer_than_the_context_is_an_error_with_its_row(run: RunFolder, tmp_path: Path) -> None:
    data = write(tmp_path / "test.jsonl", [{"text": "x" * 200, "label": "pos"}])
    with pytest.raises(GraftError, match=r"row 1: the text has 202 tokens, but the context has room for 128"):
        evaluate(run, data)


def test_values_are_scored_by_correlation(tmp_path: Path) -> None:
    rows = [
        {"text": row["text"], "score": float(row["label"] == "pos") + number / 100}
        for number, row in enumerate(labelled_rows())
    ]
    folder = train(load_run(settings(tmp_path, rows, "regression")), tmp_path / "run", quiet=True)
    result = evaluate(folder, tmp_path / "regression.jsonl")
    (found,) = result["results"]
    lines = [json.loads(line) for line in (Path(result["folder"]) / "answers.jsonl").read_text().splitlines()]
    given, gold = [float(line["answer"]) for line in lines], [row["score"] for row in rows]
    assert found["pearson"] == pytest.approx(np.corrcoef(gold, given)[0, 1]) and found["pearson"] > 0.5
    assert found["loss"] == pytest.approx(np.mean((np.array(given) - gold) ** 2), rel=1e-5)


def test_check_looks_a_classifier_over(tmp_path: Path) -> None:
    report = check(load_run(settings(tmp_path, labelled_rows())))
    assert report.problems == () and report.reload_difference == 0.0
    assert report.parts.base.fresh == ("classifier",) and report.parts.base.model.config.id2label == {
        0: "neg",
        1: "pos",
    }


def test_predict_writes_labels_with_probabilities(run: RunFolder, tmp_path: Path) -> None:
    (tmp_path / "texts.txt").write_text("good and bright 9\n\nbad 9\n")
    out = tmp_path / "labels.jsonl"
    graft_command(f"graft predict {run.path} {tmp_path / 'texts.txt'} --out {out}")
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    assert [(line["row"], line["texts"], line["label"]) for line in lines] == [
        (1, ["good and bright 9"], "pos"),
        (3, ["bad 9"], "neg"),
    ]
    assert sum(lines[0]["probabilities"].values()) == pytest.approx(1, abs=1e-5)
    assert lines[0]["probability"] == max(lines[0]["probabilities"].values())


def test_settings_of_text_are_refused(run: RunFolder, tmp_path: Path) -> None:
    with pytest.raises(GraftError, match="beams have no effect"):
        evaluate(run, write(tmp_path / "test.jsonl", labelled_rows(2)), beams=4)
    with pytest.raises(GraftError, match="a template has no effect for classification"):
        load_candidates(run, template="plain")


def test_adapters_of_different_tasks_do_not_share_a_base(run: RunFolder, tmp_path: Path) -> None:
    (tmp_path / "plain").mkdir()
    with pytest.raises(GraftError, match="adapters of different tasks do not share a base: classification in"):
        load_candidates(run, adapters=[str(tmp_path / "plain")])


def test_a_run_draws_a_head_for_other_classes_than_the_bases_and_saves_it(tmp_path: Path) -> None:
    run = settings(tmp_path, labelled_rows())
    own = AutoModelForSequenceClassification.from_pretrained(run["base"]["model"], num_labels=3)
    own.save_pretrained(run["base"]["model"])
    with pytest.raises(GraftError, match="base.head: fresh draws a new one"):
        check(load_run(run))
    run["base"]["head"] = "fresh"
    folder = train(load_run(run), tmp_path / "run", quiet=True)
    result = evaluate(folder, tmp_path / "classification.jsonl")
    (found,) = result["results"]  # the base has no head of these classes, so it is not measured
    assert found["accuracy"] > 0.9
    loaded = load_candidates(
        None, base=BaseConfig(model=run["base"]["model"], device="cpu"), adapters=[str(folder.adapter_dir("lora"))]
    )
    again = evaluate_on(loaded, tmp_path / "classification.jsonl", out=tmp_path / "again")
    assert [each["accuracy"] for each in again["results"]] == [found["accuracy"]]

"""Evaluation on a data file: outcomes, counts, losses and files."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F

import graft
from graft.bases import Base
from graft.config.eval import EvalConfig
from graft.data.samples import Example, Sample
from graft.data.templates import template_of
from graft.errors import GraftError
from graft.evaluation import evaluate, evaluate_on
from graft.evaluation.datafile import evaluate_data_file, make_evaluation
from graft.generation.loaded import Candidate, LoadedModel, load_candidates
from graft.generation.loss import sample_losses
from graft.generation.requests import Generated
from tests.runs_at_hand import ROWS, make_run, write_rows
from tests.small import small_model, small_tokenizer

ADAPTERS: dict[str, Any] = {
    "lora": {"kind": "lora", "rank": 2, "sites": "attn.q mlp.down"},
    "prefix": {"kind": "prefix", "tokens": 4},
}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(tmp_path_factory.mktemp("runs") / "math", ADAPTERS)


def samples(*pairs: tuple[str, str]) -> list[Sample]:
    return [
        Sample(({"role": "user", "content": question}, {"role": "assistant", "content": answer}), "file", row)
        for row, (question, answer) in enumerate(pairs, start=1)
    ]


class Scripted:
    """An engine whose answers come from a script, so that their outcomes are known, and a loaded model with it."""

    name = "script"

    def __init__(self, answers: dict[str, tuple[str, str]]) -> None:
        self.answers_to, self.tokenizer = answers, small_tokenizer()
        base = Base(small_model(context=40), self.tokenizer, "small", torch.device("cpu"), torch.float32)
        self.loaded = LoadedModel(base, (Candidate("base", None, template_of("plain")),), engine=self)

    def check(self, requests: Any, token_budget: int) -> int:
        return 0

    def answers(self, requests: Any, decoding: Any, token_budget: int) -> Any:
        for number, request in reversed(list(enumerate(requests))):
            text, reason = self.answers_to[str(self.tokenizer.decode(request.ids))]
            yield number, Generated(tuple(self.tokenizer(text)["input_ids"]), reason)  # type: ignore[arg-type]


def test_every_answer_has_one_outcome_and_all_are_counted(tmp_path: Path) -> None:
    scripted = Scripted(
        {
            "a": ("so it is 3.", "stopped"),
            "b": ("that makes 7", "truncated"),
            "c": ("I do not know", "stopped"),
            "d": ("", "no_room"),
            "e": ("1,000", "truncated"),
        },
    )
    rows = samples(("a", "#### 3"), ("b", "8"), ("c", "8"), ("d", "8"), ("e", "1000"))
    evaluation = make_evaluation("five", rows, EvalConfig())
    result = evaluate_data_file(scripted.loaded, evaluation, tmp_path)
    (found,) = result["results"]
    counts = {key: found[key] for key in ("total", "correct", "wrong", "unextractable", "no_room", "truncated")}
    assert counts == {"total": 5, "correct": 2, "wrong": 1, "unextractable": 1, "no_room": 1, "truncated": 2}
    assert found["accuracy"] == 0.4 and found["stop_rate"] == 0.4
    assert found["interval"][0] < 0.4 < found["interval"][1]
    lines = [json.loads(line) for line in (tmp_path / "answers.jsonl").read_text().splitlines()]
    assert {line["row"]: line["outcome"] for line in lines} == {
        1: "correct", 2: "wrong", 3: "unextractable", 4: "no_room", 5: "correct",
    }  # fmt: skip
    assert lines[0]["question"] == "e" and lines[0]["extracted"] == lines[0]["expected"] == "1000"
    assert {**json.loads((tmp_path / "result.json").read_text()), "folder": str(tmp_path)} == result


def test_a_column_answer_beside_the_worked_answer_is_what_answers_are_compared_with(run: Path, tmp_path: Path) -> None:
    rows = [
        {"instruction": "a", "output": "I think 5", "answer": 3.0},
        {"instruction": "b", "output": "x", "answer": "7"},
    ]
    data = write_rows(tmp_path / "worked.jsonl", rows)
    result = evaluate(run, data, settings=EvalConfig(max_new_tokens=2))
    assert result["protocol"]["metric"] == "numeric"
    lines = [json.loads(line) for line in (Path(result["folder"]) / "answers.jsonl").read_text().splitlines()]
    assert {(line["row"], line["expected"]) for line in lines} == {(1, "3"), (2, "7")}
    tokens = len("I think 5") + len("x") + 2
    assert {found["loss_tokens"] for found in result["results"]} == {tokens}, "the loss is that of the worked answer"
    with pytest.raises(GraftError, match="row 2, field 'answer': is missing"):
        evaluate(run, write_rows(tmp_path / "torn.jsonl", [rows[0], {"instruction": "b", "output": "x"}]))


def test_texts_are_compared_whole_where_a_reference_has_no_number() -> None:
    scripted = Scripted({"a": ("Paris.", "stopped"), "b": ("3 or 4", "stopped")})
    evaluation = make_evaluation("two", samples(("a", "paris"), ("b", "4")), EvalConfig())
    assert evaluation.metric == "exact"
    assert evaluate_data_file(scripted.loaded, evaluation)["results"][0]["correct"] == 1


def test_a_run_is_evaluated_with_its_base_and_all_its_adapters_and_leaves_files(run: Path, tmp_path: Path) -> None:
    data = write_rows(tmp_path / "test.jsonl")
    result = evaluate(run, data, settings=EvalConfig(max_new_tokens=5))
    assert [each["name"] for each in result["results"]] == ["base", "lora", "prefix"]
    assert result["self_checked"] >= 6 and result["protocol"]["metric"] == "numeric"
    folder = run / "eval" / f"test.{result['protocol_hash']}"
    assert result["folder"] == str(folder)
    assert len((folder / "answers.jsonl").read_text().splitlines()) == 3 * len(ROWS)
    again = evaluate(run, data, settings=EvalConfig(max_new_tokens=5))
    assert again["results"] == result["results"] and again["folder"] == result["folder"]
    assert len((folder / "answers.jsonl").read_text().splitlines()) == 3 * len(ROWS)


def test_questions_of_a_data_file_are_looked_for_in_the_training_data(run: Path, tmp_path: Path) -> None:
    rows = [{"question": "TWO and two ?", "answer": "4"}, {"question": "And what of six?", "answer": "6"}]
    result = evaluate(run, write_rows(tmp_path / "partly.jsonl", rows), settings=EvalConfig(max_new_tokens=1))
    (overlap,) = result["overlap"]
    assert (overlap["of"], overlap["questions"], overlap["exact"], overlap["near"]) == (["lora", "prefix"], 2, 1, 0)
    first = evaluate_on(
        load_candidates(run), tmp_path / "partly.jsonl", None, settings=EvalConfig(max_new_tokens=1, limit=1)
    )
    assert (first["limit"], first["overlap"][0]["questions"]) == (1, 1)


def test_the_loss_of_each_contestant_is_the_mean_over_the_tokens_of_the_answers(run: Path) -> None:
    """The reference: one sample at a time, transformers' own forward, the mask by the lengths of prompt and whole."""
    loaded = load_candidates(run)
    result = evaluate_on(loaded, str(run.parent / "math.jsonl"), None, settings=EvalConfig(max_new_tokens=1))
    tokenizer = loaded.base.tokenizer
    for found, candidate in zip(result["results"], loaded.candidates, strict=True):
        total, count = 0.0, 0
        for row in ROWS:
            prompt = tokenizer(row["question"])["input_ids"]
            ids = torch.tensor([prompt + tokenizer(row["answer"])["input_ids"] + [tokenizer.eos_token_id]])
            with torch.no_grad(), graft.use(loaded.base.model, candidate.adapter):
                logits = loaded.base.model(ids).logits[0, len(prompt) - 1 : -1]
            total += float(F.cross_entropy(logits, ids[0, len(prompt) :], reduction="sum"))
            count += ids.shape[1] - len(prompt)
        assert found["loss_tokens"] == count and found["loss_samples"] == len(ROWS)
        assert found["loss"] == pytest.approx(total / count, rel=1e-5)


def test_the_loss_does_not_depend_on_batches_or_company() -> None:
    import numpy as np

    model = graft.attach(small_model("bloom"), ADAPTERS)
    draw = np.random.default_rng(0)
    examples = [
        Example(draw.integers(2, 258, n).astype(np.int32), np.arange(n) > n // 2, "x", n) for n in (5, 30, 12, 7, 19)
    ]
    adapters: list[str | None] = [None, "lora", "prefix", None, "lora"]
    together = sample_losses(model, examples, adapters)
    alone = [sample_losses(model, [one], [name])[0] for one, name in zip(examples, adapters, strict=True)]
    assert together == pytest.approx(alone, rel=1e-5)


def test_the_held_out_rows_of_a_run_are_its_validation_data(tmp_path: Path) -> None:
    run = make_run(tmp_path / "split", {"lora": ADAPTERS["lora"]}, data={"validation": 1})
    result = evaluate(run, settings=EvalConfig(max_new_tokens=2))
    assert result["task"] == "validation" and result["results"][0]["total"] == 1
    from graft.data.preparing import prepare

    prepared = prepare(load_candidates(run).config.data, small_tokenizer())  # type: ignore[union-attr]
    assert prepared.validation is not None
    line = json.loads((Path(result["folder"]) / "answers.jsonl").read_text().splitlines()[0])
    assert line["row"] == prepared.validation[0].row


def test_samples_longer_than_the_context_are_counted_and_not_cut(tmp_path: Path) -> None:
    run = make_run(tmp_path / "short", {"lora": ADAPTERS["lora"]}, context=40)
    data = write_rows(tmp_path / "long.jsonl", [*ROWS, {"question": "x" * 60, "answer": "5"}])
    result = evaluate(run, data, settings=EvalConfig(max_new_tokens=3))
    for found in result["results"]:
        assert found["no_room"] == 2 and found["total"] == 4
        assert found["loss_samples"] == 2


def test_free_text_is_scored_by_bleu_rouge_and_perplexity(run: Path, tmp_path: Path) -> None:
    pytest.importorskip("rouge_score", reason="rouge-score comes with graft-llm[eval]")
    result = evaluate(run, write_rows(tmp_path / "a.jsonl"), settings=EvalConfig(max_new_tokens=2, metric="text"))
    for found in result["results"]:
        assert {"text_bleu", "rouge1", "rouge2", "rougeL", "accuracy"} <= set(found)
        assert found["perplexity"] == pytest.approx(math.exp(found["loss"]))


def test_the_protocol_changes_with_all_that_changes_scores(run: Path, tmp_path: Path) -> None:
    data, other = write_rows(tmp_path / "a.jsonl"), write_rows(tmp_path / "b.jsonl", ROWS[:2])
    loaded = load_candidates(run)

    def name(path: Path, template: str | None = None, **options: Any) -> str:
        settings = EvalConfig(max_new_tokens=options.pop("max_new_tokens", 2), metric=options.pop("metric", "auto"))
        chosen = loaded if template is None else load_candidates(run, template=template)
        return evaluate_on(chosen, path, None, settings=settings, **options)["protocol_hash"]

    names = [
        name(data),
        name(other),
        name(data, max_new_tokens=3),
        name(data, metric="exact"),
        name(data, metric="text"),
        name(data, beams=2),
        name(data, template="alpaca"),
    ]
    assert len(set(names)) == len(names)
    assert name(data) == names[0]


def test_rows_without_question_answer_or_number_are_named() -> None:
    only_text = [Sample(({"role": "assistant", "content": "text"},), "f.jsonl", 7)]
    with pytest.raises(GraftError, match="f.jsonl, row 7: there is no question"):
        make_evaluation("x", only_text, EvalConfig())
    with pytest.raises(GraftError, match="file, row 1: there is no answer"):
        make_evaluation("x", samples(("a", " ")), EvalConfig())
    with pytest.raises(GraftError, match="row 2: there is no number"):
        make_evaluation("x", samples(("a", "1"), ("b", "one")), EvalConfig(metric="numeric"))


def test_adapters_are_named_by_their_folders_and_refused_where_names_collide(run: Path, tmp_path: Path) -> None:
    folder = run / "adapters" / "lora"
    from graft.config.base import BaseConfig

    base = BaseConfig(model=str(run.parent / "math-base"), device="cpu")
    assert [each.name for each in load_candidates(None, base, [str(folder), f"mine={folder}"]).candidates] == [
        "base",
        "lora",
        "mine",
    ]
    assert [each.name for each in load_candidates(None, base, [str(run)]).candidates] == [
        "base",
        "math-lora",
        "math-prefix",
    ]
    with pytest.raises(GraftError, match="lora is named twice: name it once"):
        load_candidates(run, None, [str(folder)])
    with pytest.raises(GraftError, match=r"two adapters are called 'lora', in .*as in --adapter lora-2="):
        load_candidates(run, None, [f"lora={folder.parent / 'prefix'}"])
    with pytest.raises(GraftError, match="'base' is the bare base"):
        load_candidates(run, None, [f"base={folder}"])
    with pytest.raises(GraftError, match="name a run folder, or a base"):
        load_candidates()


def test_every_contestant_gets_the_template_of_its_adapter_unless_the_user_names_one(run: Path, tmp_path: Path) -> None:
    other = make_run(tmp_path / "other", {"series": {"kind": "series", "bottleneck": 4}}, data={"template": "alpaca"})
    loaded = load_candidates(run, None, [str(other / "adapters" / "series")], any_base=True)
    assert [each.template.name for each in loaded.candidates] == ["plain", "plain", "plain", "alpaca"]
    named = load_candidates(run, template="alpaca")
    assert [each.template.name for each in named.candidates] == ["alpaca"] * 3


def test_an_adapter_of_another_base_is_refused(run: Path, tmp_path: Path) -> None:
    other = make_run(tmp_path / "gpt", {"lora": ADAPTERS["lora"]}, family="gpt2")
    with pytest.raises(GraftError, match="was made for .*gpt-base.*, not for"):
        load_candidates(run, None, [f"other={other / 'adapters' / 'lora'}"])

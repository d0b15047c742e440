"""Documents that are split, rows of megabytes, repeats in a validation split, and labels that are numbers."""

from __future__ import annotations

import json

import numpy as np
import pytest

from graft.config.data import DataConfig
from graft.data import long_texts
from graft.data.preparing import prepare
from graft.data.report import conversation_key
from graft.data.splits import samples_of
from graft.errors import GraftError


def prepared(tmp_path, tokenizer, rows, **settings):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return prepare(
        DataConfig.model_validate({"train": str(path), "cache": False, "template": "plain", **settings}), tokenizer
    )


@pytest.mark.parametrize("max_length", [5, 16, 17, 200])
@pytest.mark.parametrize("length", [1, 15, 16, 17, 32, 400])
def test_every_token_of_a_split_document_is_a_target_once(tmp_path, tokenizer, max_length, length):
    text = "the cat sat on the mat and the dog ate the bone. "[: length % 50 + 1] * (length // 50 + 1)
    whole = prepared(tmp_path, tokenizer, [{"text": text}], max_length=10_000).train[0]
    done = prepared(tmp_path, tokenizer, [{"text": text}], max_length=max_length, overlong="split")
    targets = np.concatenate([piece.input_ids[piece.supervised] for piece in done.train])
    assert targets.tolist() == whole.input_ids[whole.supervised].tolist()
    assert max(len(piece.input_ids) for piece in done.train) <= max_length
    start = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    assert all(piece.input_ids[: len(start)].tolist() == start for piece in done.train)
    assert done.report.train.rows == 1 and done.report.train.split == (len(done.train) > 1)


def test_only_plain_text_is_split(tmp_path, tokenizer):
    rows = [{"text": "short"}, {"prompt": "the cat " * 40, "completion": "x"}]
    with pytest.raises(GraftError, match="row 1: .*cuts rows of plain text alone"):
        prepared(tmp_path, tokenizer, rows[1:], max_length=30, overlong="split")
    with pytest.raises(GraftError, match=r"data\.overlong split cuts rows of plain text; with data.task preference"):
        prepared(tmp_path, tokenizer, rows, task="preference", overlong="split")
    with pytest.raises(GraftError, match=r"data\.overlong=split +cuts documents"):
        prepared(tmp_path, tokenizer, [{"text": "the cat " * 40}], max_length=30)


@pytest.mark.parametrize("task", ["causal", "classification", "preference"])
def test_a_long_row_gives_what_it_gave_when_tokenised_whole(tmp_path, tokenizer, task, monkeypatch):
    long, row = "the cat sat on the mat. " * 300, {}
    row |= {"classification": {"text": long, "label": "a"}, "preference": {"prompt": long, "chosen": "b", "rejected": "c"}}.get(
        task, {"instruction": "What?", "input": long, "output": "b"}
    )  # fmt: skip
    other = {"classification": {"text": "x", "label": "b"}, "preference": {"prompt": "a", "chosen": "b", "rejected": "c"}}.get(
        task, {"instruction": "a", "output": "b"}
    )  # fmt: skip
    settings = {"task": task, "max_length": 200, "overlong": "truncate_prompt"}
    settings |= {} if task == "classification" else {"template": "alpaca"}
    settings |= {"template": "auto"} if task == "classification" else {}
    whole = prepared(tmp_path, tokenizer, [row, other], **settings)
    monkeypatch.setattr(long_texts, "LONG", 1000)
    monkeypatch.setattr(long_texts, "PIECE", 480)
    assert len(long) > 32 * 200
    pieces = prepared(tmp_path, tokenizer, [row, other], **settings)
    assert pieces.train.digest == whole.train.digest
    dropped = prepared(tmp_path, tokenizer, [row, other], **{**settings, "overlong": "drop"})
    assert dropped.report.train.dropped == 1
    assert dropped.report.train.longest == pytest.approx(
        whole.report.train.longest, rel=0.1
    )  # the template is not counted


@pytest.mark.parametrize("validation", [1, 3, 10, 0.3])
def test_repeats_never_fall_on_both_sides_of_a_split(tmp_path, validation):
    rng = np.random.default_rng(0)
    rows = [{"prompt": f"q{rng.integers(40)}", "completion": "x"} for _ in range(60)]
    path = tmp_path / "rows.json"
    path.write_text(json.dumps(rows))
    for seed in range(5):
        (train,), held = samples_of(DataConfig(train=str(path), validation=validation, seed=seed))
        assert not {*map(conversation_key, train)} & {*map(conversation_key, held)}
        assert len(train) + len(held) == 60 and 0 <= len(held) <= (18 if validation == 0.3 else validation)
    path.write_text(json.dumps(rows[:1] * 5))
    with pytest.raises(GraftError, match="repeats are held out together or not at all"):
        samples_of(DataConfig(train=str(path), validation=2))


@pytest.mark.parametrize(
    ("written", "labels"),
    [(["-1", "1"], [-1, 1]), (["0.5", "1.5"], [0.5, 1.5]), (["1.0", "2.0"], [1.0, 2.0]), (["1", "2"], [1.0, 2.0]), (["1", "x"], [1, "x"]),
     (["1e3", "7"], ["1e3", 7])],
)  # fmt: skip
def test_labels_may_be_any_number(tmp_path, tokenizer, written, labels):
    path = tmp_path / "rows.csv"
    path.write_text("text,label\n" + "".join(f"word,{label}\n" for label in written))
    done = prepare(DataConfig(train=str(path), task="classification", labels=labels, cache=False), tokenizer)
    assert done.template.labels == tuple(written)
    assert [example.label for example in done.train] == [0, 1]

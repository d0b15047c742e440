"""Texts with labels: which columns hold them, which label is which class, what is an error and in which row."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from graft.config.data import DataConfig, SourceConfig
from graft.data.inspect import coloured, learnt_text
from graft.data.labelling import Labelling, load_labelling, saved_task
from graft.data.preparing import Prepared, prepare
from graft.errors import GraftError
from tests.task_bases import task_tokenizer

TOKENIZER = task_tokenizer("bert")


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def made(tmp_path: Path, rows: list[dict[str, Any]], **settings: Any) -> Prepared:
    file = write(tmp_path / "rows.jsonl", rows)
    source = SourceConfig(path=str(file), fields=settings.pop("fields", {}))
    options = {"task": "classification", "cache": False, **settings}
    return prepare(DataConfig(train=source, **options), TOKENIZER, options.pop("cache_dir", None))


ROWS = [{"text": "fine", "label": "pos"}, {"text": "poor", "label": "neg"}, {"text": "good", "label": "pos"}]


def test_classes_are_the_labels_in_their_order_and_ids_are_the_tokenizers_own(tmp_path: Path) -> None:
    data = made(tmp_path, ROWS)
    assert data.classes == ("neg", "pos")
    assert [example.label for example in data.train] == [1, 0, 1]
    assert data.train[0].input_ids.tolist() == TOKENIZER("fine")["input_ids"]
    assert data.report.labels == (("neg", "neg", 1), ("pos", "pos", 2)) and "neg 1, pos 2" in data.report._classes()[0]
    assert data.train.targets.tolist() == [1, 1, 1] and data.report.learnt == "of 2 classes"


def test_numbers_are_classes_in_the_order_of_numbers_and_get_the_names_that_are_given(tmp_path: Path) -> None:
    rows = [{"text": f"t{number}", "label": number} for number in (10, 2, 1, 2)]
    assert made(tmp_path, rows).classes == ("1", "2", "10")
    named = made(tmp_path, rows, labels={1: "low", 2: "middle", 10: "high"})
    assert named.classes == ("low", "middle", "high") and [one.label for one in named.train] == [2, 1, 0, 1]
    ordered = made(tmp_path, rows, labels=[10, 2, 1])
    assert ordered.classes == ("10", "2", "1") and [one.label for one in ordered.train] == [0, 1, 2, 1]


def test_the_order_of_the_bases_own_head_is_kept_where_its_classes_are_those_of_the_data() -> None:
    from graft.data.reading import Sample

    samples = [
        Sample(({"role": "user", "content": "x"}, {"role": "assistant", "content": label}), "f", 1)
        for label in ("negative", "positive")
    ]
    config = DataConfig(train="f", task="classification")
    assert Labelling.of(config, samples, ("POSITIVE", "NEGATIVE")).names == ("positive", "negative")
    assert Labelling.of(config, samples, ("LABEL_0", "LABEL_1")).names == ("negative", "positive")


@pytest.mark.parametrize(
    ("columns", "fields"),
    [
        (("sentence1", "sentence2", "label"), {}),
        (("premise", "hypothesis", "gold_label"), {}),
        (("one", "other", "verdict"), {"text": "one", "text_pair": "other", "label": "verdict"}),
    ],
)
def test_pairs_are_encoded_as_the_tokenizer_encodes_pairs(
    tmp_path: Path, columns: tuple[str, str, str], fields: dict[str, str]
) -> None:
    first, second, label = columns
    rows = [{first: "a cat", second: "an animal", label: "yes"}, {first: "a", second: "b", label: "no"}]
    data = made(tmp_path, rows, fields=fields)
    theirs = TOKENIZER("a cat", "an animal")
    example = data.train[0]
    assert example.input_ids.tolist() == theirs["input_ids"]
    assert (
        example.token_types is not None
        and example.token_types.tolist() == theirs["token_type_ids"]
        and example.token_types.any()
    )


def test_tsv_and_csv_are_read_too(tmp_path: Path) -> None:
    (tmp_path / "rows.tsv").write_text('sentence\tlabel\nso "good"\t1\nbad\t0\n')
    (tmp_path / "rows.csv").write_text('text,label\n"fine, really",1\nbad,0\n')
    for name in ("rows.tsv", "rows.csv"):
        config = DataConfig(train=str(tmp_path / name), task="classification", cache=False)
        data = prepare(config, TOKENIZER)
        assert data.classes == ("0", "1") and [one.label for one in data.train] == [1, 0]


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"text": "x"}, r"row 4, field 'label': is missing"),
        ({"text": "x", "label": None}, r"row 4, field 'label': is missing"),
        ({"text": "x", "label": " "}, r"row 4, field 'label': is empty"),
        ({"text": "x", "label": -1}, r"row 4, field 'label': is -1, which stands for a label that was not published"),
        ({"label": "pos"}, r"row 4, field 'text': is missing"),
    ],
)
def test_a_row_without_text_or_label_is_an_error_with_its_number(
    tmp_path: Path, row: dict[str, Any], said: str
) -> None:
    with pytest.raises(GraftError, match=said):
        made(tmp_path, [*ROWS, row])


def test_a_label_that_is_none_of_the_classes_is_an_error_with_its_row(tmp_path: Path) -> None:
    with pytest.raises(GraftError, match=r"row 2: the label 'neg' is not one of the classes pos, net\."):
        made(tmp_path, [*ROWS, {"text": "x", "label": "net"}], labels=["pos", "net"])
    held_out = write(tmp_path / "held.jsonl", [{"text": "x", "label": "neutral"}])
    with pytest.raises(GraftError, match=r"held\.jsonl, row 1: the label 'neutral' is not one of the classes"):
        made(tmp_path, ROWS, validation=str(held_out))


def test_one_class_alone_and_classes_that_no_row_has_are_errors(tmp_path: Path) -> None:
    with pytest.raises(GraftError, match=r"needs two or more classes; the training data hold 'pos' \(1\)"):
        made(tmp_path, ROWS[:1])
    with pytest.raises(GraftError, match=r"names 'neutral', but no training sample has"):
        made(tmp_path, ROWS, labels=["neg", "pos", "neutral"])
    with pytest.raises(GraftError, match=r"the same name to several classes"):
        made(tmp_path, ROWS, labels={"neg": "same", "pos": "same"})


def test_columns_that_hold_no_text_are_an_error_that_lists_them(tmp_path: Path) -> None:
    with pytest.raises(
        GraftError, match=r"no column holds the texts of a classification; its columns are words, label"
    ):
        made(tmp_path, [{"words": "x", "label": "a"}])
    with pytest.raises(GraftError, match=r"no column holds the label of a classification"):
        made(tmp_path, [{"text": "x", "verdict": "a"}])


@pytest.mark.parametrize("task", ["classification", "regression"])
@pytest.mark.parametrize("column", ["messages", "conversations", "text"])
def test_chat_text_in_place_of_a_text_says_what_to_do(column: str, task: str, tmp_path: Path) -> None:
    rows = [{column: [{"role": "user", "content": "x"}], "label": 1}]
    with pytest.raises(
        GraftError,
        match=f"hold.? chat text.*{task} reads plain text: write .* into a column `text`.*leave data.task out",
    ):
        made(tmp_path, rows, task=task)


def test_a_text_that_does_not_fit_stops_the_run_is_left_out_or_is_cut_at_its_end(tmp_path: Path) -> None:
    rows = [*ROWS, {"text": "a very long text", "label": "neg"}]
    with pytest.raises(
        GraftError, match=r"1 of 4 samples are longer than data\.max_length=8 tokens; the longest has 18"
    ):
        made(tmp_path, rows, max_length=8)
    assert len(made(tmp_path, rows, max_length=8, overlong="drop").train) == 3
    cut = made(tmp_path, rows, max_length=8, overlong="truncate_prompt")
    theirs = TOKENIZER("a very long text", truncation=True, max_length=8)["input_ids"]
    assert cut.train[3].input_ids.tolist() == theirs and cut.train[3].cut == 10 and cut.report.train.cut == 1


def test_special_tokens_in_the_text_stay_text(tmp_path: Path) -> None:
    data = made(tmp_path, [{"text": "a <sep> b", "label": "x"}, *ROWS])
    assert data.train[0].input_ids.tolist().count(TOKENIZER.convert_tokens_to_ids("<sep>")) == 1


def test_an_empty_text_is_left_out_and_counted(tmp_path: Path) -> None:
    data = made(tmp_path, [*ROWS, {"text": " ", "label": "pos"}])
    assert len(data.train) == 3 and data.report.train.empty == 1
    assert "1 training row has no text" in " ".join(data.report.notes)


@pytest.mark.parametrize(
    "settings",
    [
        {"template": "alpaca"},
        {"system": "Be brief."},
        {"train_on": "all"},
        {"task": "causal", "labels": ["a", "b"]},
        {"task": "regression", "labels": ["a", "b"]},
    ],
)
def test_a_setting_without_effect_is_an_error(tmp_path: Path, settings: dict[str, Any]) -> None:
    rows = [{"text": "x", "label": 1}, {"text": "y", "label": 2}]
    with pytest.raises(GraftError, match="no effect|has no classes"):
        made(tmp_path, rows, **settings)


def test_values_are_numbers_and_anything_else_is_an_error_with_its_row(tmp_path: Path) -> None:
    rows = [{"sentence1": "a", "sentence2": "b", "score": "4.5"}, {"sentence1": "c", "sentence2": "d", "score": 2}]
    data = made(tmp_path, rows, task="regression")
    assert data.train.labels.dtype == np.float64 and [one.label for one in data.train] == [4.5, 2.0]
    assert data.classes == () and data.report.learnt == "each with a value"
    for bad in ("good", "nan", "inf"):
        with pytest.raises(GraftError, match=rf"row 3: a regression needs a number as its label; given '{bad}'"):
            made(tmp_path, [*rows, {"sentence1": "e", "sentence2": "f", "score": bad}], task="regression")


def test_held_out_rows_are_the_same_whatever_their_order_and_the_cache_gives_all_back(tmp_path: Path) -> None:
    rows = [{"text": f"text {number}", "label": number % 3} for number in range(30)]
    forth = made(tmp_path, rows, validation=6)
    back = made(tmp_path, rows[::-1], validation=6)
    assert forth.validation is not None and back.validation is not None
    texts = [{bytes(one.input_ids) for one in each.validation} for each in (forth, back)]
    assert texts[0] == texts[1] and len(texts[0]) == 6
    config = DataConfig(
        train=str(tmp_path / "rows.jsonl"), task="classification", validation=6, labels={0: "a", 1: "b", 2: "c"}
    )
    first, second = (prepare(config, TOKENIZER, tmp_path / "cache") for _ in range(2))
    assert second.cached and not first.cached
    assert second.template == first.template and second.train.digest == first.train.digest
    assert second.report.labels == first.report.labels and second.classes == ("a", "b", "c")


def test_labels_are_part_of_the_digest_that_resuming_compares(tmp_path: Path) -> None:
    other = [{**row, "label": "neg" if row["label"] == "pos" else "pos"} for row in ROWS]
    assert made(tmp_path, ROWS).train.digest != made(tmp_path, other).train.digest


def test_what_labels_mean_is_saved_beside_the_adapter(tmp_path: Path) -> None:
    labelling = Labelling("classification", ("0", "1"), ("no", "yes"))
    labelling.save(tmp_path)
    assert load_labelling(tmp_path) == labelling and saved_task(tmp_path) == "classification"
    (tmp_path / "task.json").write_text("{}")
    with pytest.raises(GraftError, match=r"cannot read the adapter's labels from .*task\.json"):
        load_labelling(tmp_path)
    assert saved_task(tmp_path / "nowhere") is None


def test_a_sample_is_shown_with_its_label(tmp_path: Path) -> None:
    data = made(tmp_path, ROWS)
    assert learnt_text(data.train[0], TOKENIZER, data.classes) == "pos"
    assert coloured(data.train[0], TOKENIZER, marks=True, classes=data.classes).plain == "<cls>fine<sep> -> ⟦pos⟧"

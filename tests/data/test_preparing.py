"""From a config to data sets: splits, sources, reports, errors and the cache."""

from __future__ import annotations

import io
import json

import pytest
from rich.console import Console

from graft.config.data import DataConfig
from graft.data import cache
from graft.data.preparing import prepare
from graft.data.report import DataReport
from graft.errors import GraftError


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def rows(count, answer="the cat"):
    return [{"prompt": f"{number} ?", "completion": answer} for number in range(count)]


@pytest.fixture
def data(tmp_path):
    return write(tmp_path / "data.jsonl", rows(40))


def config(train, **settings):
    return DataConfig(**{"train": train, "template": "plain", **settings})


def row_numbers(dataset):
    return dataset.rows.tolist()


def test_rows_become_examples_in_order(data, gpt):
    prepared = prepare(config(data), gpt)
    assert row_numbers(prepared.train) == list(range(1, 41))
    assert prepared.validation is None and prepared.template.name == "plain" and not prepared.cached
    text = gpt.decode(prepared.train[2].input_ids.tolist())
    assert text == "2 ?the cat<|end|>"


@pytest.mark.parametrize(("share", "count"), [(5, 5), (0.25, 10), (0.001, 1)])
def test_a_part_is_held_out_by_count_or_fraction(data, gpt, share, count):
    prepared = prepare(config(data, validation=share), gpt)
    assert prepared.validation is not None and len(prepared.validation) == count
    assert sorted(row_numbers(prepared.train) + row_numbers(prepared.validation)) == list(range(1, 41))


def test_the_split_is_seeded_and_follows_rows_not_their_order(tmp_path, data, gpt):
    def held_out(path, seed):
        chosen = prepare(config(path, validation=8, seed=seed), gpt).validation
        return {gpt.decode(example.input_ids.tolist()) for example in chosen}

    backwards = write(tmp_path / "backwards.jsonl", rows(40)[::-1])
    assert held_out(data, 0) == held_out(data, 0) == held_out(backwards, 0)
    assert held_out(data, 0) != held_out(data, 1)


def test_no_split_for_zero_or_nothing(data, gpt):
    assert prepare(config(data, validation=0), gpt).validation is None
    assert prepare(config(data, validation=None), gpt).validation is None


def test_more_validation_than_data_is_an_error(data, gpt):
    with pytest.raises(GraftError, match="data.validation is 40, but there are only 40 samples"):
        prepare(config(data, validation=40), gpt)


def test_validation_from_a_file_and_the_rows_it_shares_are_reported(tmp_path, data, gpt):
    other = write(tmp_path / "other.jsonl", [*rows(3), {"prompt": "new", "completion": "dog"}])
    prepared = prepare(config(data, validation=other), gpt)
    assert prepared.validation is not None and len(prepared.validation) == 4 and prepared.report.shared == 3
    assert "3 validation samples are in the training data too." in prepared.report.notes


def test_several_sources_keep_their_weights_and_counts(tmp_path, data, gpt):
    other = write(tmp_path / "other.jsonl", rows(10, "dog"))
    prepared = prepare(config([data, {"path": other, "weight": 2.5}]), gpt)
    assert prepared.train.weights.tolist() == [1.0] * 40 + [2.5] * 10
    assert len(prepared.train.epoch_order(0, 0)) == 40 + 25
    assert [(source.name, source.rows) for source in prepared.report.sources] == [(data, 40), (other, 10)]
    assert prepared.report.train.rows == 50
    with pytest.raises(GraftError, match="with weight 0.01, 10 samples give less than one per epoch"):
        prepare(config([data, {"path": other, "weight": 0.01}]), gpt)


def test_the_report_counts_what_is_there(tmp_path, gpt):
    # With GPT-2's kind of tokenizer and the plain template: length = tokens of the prompt + of the answer + 1.
    def length(row):
        return len(gpt(row["prompt"])["input_ids"]) + len(gpt(row["completion"])["input_ids"]) + 1

    good = rows(3) + rows(1)
    long = [{"prompt": "the cat " * 30, "completion": "the"}, {"prompt": "x", "completion": "the dog " * 30}]
    path = write(tmp_path / "data.jsonl", [*good, *long, {"prompt": "x", "completion": " "}])
    report = prepare(config(path, overlong="truncate_prompt", max_length=30), gpt).report
    train = report.train
    assert (train.rows, train.samples, train.overlong, train.cut, train.dropped, train.empty) == (7, 5, 2, 1, 1, 1)
    lengths = sorted(length(row) for row in [*good, *long])
    assert train.longest == lengths[-1] and lengths[0] <= train.p50 <= train.p95 <= lengths[-1]
    targets = sum(len(gpt(row["completion"])["input_ids"]) + 1 for row in [*good, long[0]])
    assert train.tokens == sum(map(length, good)) + 30 and train.targets == targets
    assert train.supervised_share == targets / train.tokens
    assert report.duplicates == 1
    assert report.notes == (
        "1 training sample repeats an earlier one.",
        "1 training row has no answer: left out.",
    )
    assert DataReport.from_dict(json.loads(json.dumps(report.to_dict()))) == report


def test_the_report_prints_as_a_table(data, gpt):
    out = io.StringIO()
    Console(file=out, width=60).print(prepare(config(data, validation=4), gpt).report)
    lines = [line.split() for line in out.getvalue().splitlines()]
    assert (
        ["train", "validation"] in lines
        and ["rows", "36", "4"] in lines
        and ["longer", "than", "512", "0", "0"] in lines
    )


def test_overlong_samples_stop_with_counts_the_longest_and_the_three_choices(tmp_path, gpt):
    path = write(tmp_path / "data.jsonl", [*rows(3), {"prompt": "x" * 100, "completion": "y"}])
    with pytest.raises(GraftError) as error:
        prepare(config(path, max_length=20), gpt)
    assert str(error.value) == (
        f"1 of 4 samples are longer than data.max_length=20 tokens; the longest has 102 ({path}, row 4). Choose one:\n"
        "  data.max_length=104           keeps every sample whole\n"
        "  data.overlong=drop            leaves these samples out\n"
        "  data.overlong=truncate_prompt shortens their questions, never an answer"
    )
    assert len(prepare(config(path, max_length=20, overlong="drop"), gpt).train) == 3
    assert len(prepare(config(path, max_length=104), gpt).train) == 4


def test_nothing_left_to_train_on_is_an_error_with_the_reasons(tmp_path, gpt):
    path = write(tmp_path / "data.jsonl", [{"prompt": "x", "completion": ""}, {"prompt": "x" * 99, "completion": "y"}])
    with pytest.raises(
        GraftError, match="no token is left to train on. Of 2 rows, 1 are longer .* 1 have an empty answer"
    ):
        prepare(config(path, max_length=20, overlong="drop"), gpt)


def test_a_tokenizer_without_an_end_is_an_error_before_anything_is_read(tmp_path, gpt):
    gpt.eos_token = None
    with pytest.raises(GraftError, match="no end-of-sequence token"):
        prepare(config(str(tmp_path / "missing.jsonl")), gpt)


def test_progress_is_told(data, gpt):
    told = []
    prepare(config(data), gpt, progress=lambda done, total: told.append((done, total)))
    assert told[-1] == (40, 40)


def test_chat_templates_bring_notes(data, chatty):
    notes = " ".join(prepare(config(data, template="chat"), chatty).report.notes)
    assert "Answers end with <|im_end|>" in notes
    assert ("omits <s>" in notes) == (chatty.bos_token is not None)


def same(one, other):
    assert one.train.digest == other.train.digest and one.report == other.report
    assert one.train.sources == other.train.sources and one.train.rows.tolist() == other.train.rows.tolist()
    assert (one.validation is None) == (other.validation is None)


def test_the_cache_gives_back_the_same_data(tmp_path, data, gpt):
    settings = config(data, validation=5, overlong="drop")
    fresh, cached = (prepare(settings, gpt, tmp_path / "cache") for _ in range(2))
    assert not fresh.cached and cached.cached
    same(fresh, cached)
    assert fresh.validation is not None and cached.validation is not None
    assert fresh.validation.digest == cached.validation.digest
    assert [file.suffix for file in (tmp_path / "cache").iterdir()] == [".safetensors"]
    assert not prepare(config(data, cache=False), gpt, tmp_path / "cache").cached


def test_the_cache_key_follows_data_tokenizer_template_settings_and_code(tmp_path, data, gpt, llama, monkeypatch):
    folder = tmp_path / "cache"
    prepare(config(data), gpt, folder)
    assert prepare(config(data), gpt, folder).cached
    for other in ({"max_length": 100}, {"train_on": "all"}, {"system": "s"}, {"template": "alpaca"}, {"validation": 3}):
        assert not prepare(config(data, **other), gpt, folder).cached
    assert not prepare(config({"path": data, "limit": 39}), gpt, folder).cached
    assert not prepare(config({"path": data, "weight": 2.0}), gpt, folder).cached
    assert not prepare(config(data), llama, folder).cached
    write(tmp_path / "data.jsonl", rows(40, "the dog"))
    assert not prepare(config(data), gpt, folder).cached
    monkeypatch.setattr(cache, "_code", lambda: "changed")
    assert not prepare(config(data), gpt, folder).cached


def test_padding_set_on_a_tokenizer_does_not_change_the_key(gpt):
    before = cache.tokenizer_hash(gpt)
    gpt.pad_token = gpt.eos_token
    changed = cache.tokenizer_hash(gpt)
    gpt(["a", "the cat"], padding=True, truncation=True, max_length=2)
    assert cache.tokenizer_hash(gpt) == changed != before


@pytest.mark.parametrize("damage", ["cut", "flip", "empty"])
def test_a_broken_cache_is_made_anew_with_a_note(tmp_path, data, gpt, damage):
    fresh = prepare(config(data), gpt, tmp_path / "cache")
    (file,) = (tmp_path / "cache").iterdir()
    content = bytearray(file.read_bytes())
    if damage == "flip":
        content[-1] ^= 1
    file.write_bytes({"cut": content[: len(content) // 2], "flip": content, "empty": b""}[damage])
    again = prepare(config(data), gpt, tmp_path / "cache")
    assert not again.cached and again.train.digest == fresh.train.digest
    assert f"The cached data in {file} were broken" in again.report.notes[-1]
    assert prepare(config(data), gpt, tmp_path / "cache").cached


def test_real_alpaca_rows_are_counted_as_they_are(shared, gpt):
    path = str(shared / "data/alpaca/alpaca_random_9k.json")
    report = prepare(config({"path": path, "limit": 1500}, template="alpaca", max_length=4096), gpt).report
    assert (report.train.rows, report.train.empty, report.train.samples) == (1500, 1, 1499)  # row 1462 has no output


def test_targets_that_the_tokenizer_cannot_write_are_an_error_with_their_share(llama, tmp_path):
    llama.backend_tokenizer.model.byte_fallback = False
    rows = tmp_path / "rows.jsonl"
    rows.write_text(json.dumps({"prompt": "the cat 猫", "completion": "sat"}) + "\n")
    settings = {"train": str(rows), "template": "plain", "cache": False}
    assert prepare(DataConfig.model_validate(settings), llama).report.train.samples == 1  # it is only read there
    rows.write_text(json.dumps({"prompt": "the cat", "completion": "sat 猫"}) + "\n")
    with pytest.raises(GraftError, match=r"1 of \d+ targets \(\d+\.\d%\) are <unk>: .*'猫'.*row 1"):
        prepare(DataConfig.model_validate(settings), llama)
